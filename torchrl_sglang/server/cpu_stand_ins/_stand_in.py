"""Modules that can be imported but not run, for GPU packages that SGLang imports without using them on a CPU.

After ``install("triton")`` all of these work: ``import triton.language as tl``, ``from triton.x import Y, z``,
``@triton.jit``, ``@triton.autotune(...)``, ``class Kernel(triton.Base)``. Only modules under an installed name are
affected; a missing module of any other name fails as always. Nothing here is imported by the library itself: this
folder is on the ``PYTHONPATH`` of server processes alone.
"""

import importlib.abc
import importlib.machinery
import sys
import types


class _PlaceholderMeta(type):
    """Class attributes of a placeholder class are placeholders again (``Base.Inner``, ``Enum.MEMBER``)."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Placeholder


class Placeholder(metaclass=_PlaceholderMeta):
    """Stands for any class: can be subclassed, instantiated, and used as a decorator."""

    def __init__(self, *args, **kwargs):
        pass

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__()

    def __call__(self, *args, **kwargs):
        return args[0] if _is_plain_decoration(args, kwargs) else self


class PlaceholderModule(types.ModuleType):
    """Stands for a module, and for any lower-case name in one: it has every attribute, and calls act as decorators."""

    def __init__(self, name):
        super().__init__(name)
        self.__path__ = []  # a package: `import name.anything` is looked up by the finder below

    def __getattr__(self, name):
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)  # `hasattr(module, "__file__")` must stay correct
        full_name = f"{self.__name__}.{name}"
        if full_name in sys.modules:
            return sys.modules[full_name]
        if name[:1].isupper():
            value = type(name, (Placeholder,), {"__module__": self.__name__})
        else:
            value = PlaceholderModule(full_name)
            value.__spec__ = importlib.machinery.ModuleSpec(full_name, _FINDER, is_package=True)
        setattr(self, name, value)
        return value

    def __call__(self, *args, **kwargs):
        if _is_plain_decoration(args, kwargs):
            return args[0]
        return lambda function: function

    # Feature checks (`if triton.x:`, `for config in triton.configs`) must be false or empty.
    def __bool__(self):
        return False

    def __iter__(self):
        return iter(())

    def __contains__(self, item):
        return False


def _is_plain_decoration(args, kwargs):
    """``@name`` rather than ``@name(...)``: called with the decorated function and nothing else."""
    return len(args) == 1 and callable(args[0]) and not kwargs


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers `import root.anything` for installed roots with placeholder modules."""

    def __init__(self):
        self.roots = set()

    def find_spec(self, fullname, path=None, target=None):
        root, _, rest = fullname.partition(".")
        if rest and root in self.roots:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        # `tl = triton.language` before `import triton.language` must end up being the same object.
        parent, _, leaf = spec.name.rpartition(".")
        existing = vars(sys.modules[parent]).get(leaf)
        return existing if isinstance(existing, PlaceholderModule) else PlaceholderModule(spec.name)

    def exec_module(self, module):
        pass


_FINDER = _Finder()
sys.meta_path.append(_FINDER)  # last: real modules win


def install(name, **attributes):
    """Turn the module ``name``, whose import is running, into a placeholder with these real attributes."""
    _FINDER.roots.add(name)
    module = sys.modules[name]
    module.__class__ = PlaceholderModule
    module.__path__ = []
    for attribute, value in attributes.items():
        setattr(module, attribute, value)
