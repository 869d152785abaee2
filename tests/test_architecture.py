"""The import direction of DESIGN, and habits that a linter does not know, read from the syntax tree of every module.

``violations(root)`` checks a whole tree; the tests below it run it on this repository, and on small wrong trees, since
a rule that never fires protects nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "torchrl_sglang"

# A unit is a module or folder right under the package. It imports itself and units of the lines above its own; only
# PEERS, the line with the engine, import each other, and of those `rollout` and `weights` never meet.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors"}),
    frozenset({"disk_space", "message_forms", "text_tokens"}),
    frozenset({"disk_space", "fast_tokenizers"}),
    frozenset({"text_tokens"}),
    frozenset({"chat_templates"}),
    frozenset({"cached_folder", "progress"}),
    frozenset({"smollm2"}),
    frozenset({"server_url"}),
    frozenset({"config", "forks", "model_files", "parallel", "reply_deadline", "tls"}),
    frozenset({"protocol"}),
    frozenset({"proxies"}),
    frozenset({"connections", "http_errors"}),
    frozenset({"client"}),
    frozenset({"pool", "server"}),
    frozenset({"rollout", "weights", "engine", "chat", "scores"}),
    frozenset({"testing"}),
    frozenset({"agents", "doctor", "hydra_configs", "ray_servers"}),
    frozenset({"cli", "recipes"}),
    frozenset({"__main__"}),
)
PEERS = next(units for units in LAYERS if "engine" in units)
NEVER_MEET = frozenset({"rollout", "weights"})
LAYER_OF = {unit: index for index, units in enumerate(LAYERS) for unit in units}

# Layers inside a package, lowest first: a subfolder or module imports those to its left, and nothing of the package
# that is not named here. The package's own __init__ imports any of them.
SUBLAYERS: dict[str, tuple[str, ...]] = {
    "pool": (
        *(
            "records",
            "record_store",
            "update_events",
            "state",
            "update_lock",
            "checks",
            "balanced_addresses",
            "reply_weights",
            "router_client",
            "affinity",
            "balancing",
            "streaming",
        ),
        *(
            "dispatch",
            "batch",
            "dead_servers",
            "replaced_servers",
            "end_tokens",
            "batch_run",
            "stream_run",
            "member_file",
            "returned_servers",
            "draining",
        ),
        *("membership", "copied_members", "servers", "pool", "resolve", "earlier_weights", "server_list", "following"),
    ),
    "recipes": ("available", "setup", "data", "batch", "losses", "run", "tools"),
    "weights": (
        *("checkpoint", "source", "buckets", "checksums", "group", "update", "shared_memory"),
        *("transports", "planning", "newcomers", "held_weights", "push", "pending_sync", "sync", "scheme"),
    ),
}

# Where private names of libraries that move may be used: one place to mend when they do.
PRIVATE_NAMES_ALLOWED = {
    ("torch.distributed", "torch._C._distributed_c10d"): {"weights/group/process_group.py"},
    ("torchrl",): {"rollout/tensorclasses.py", "weights/scheme.py"},
}
# These are programs: what they print is their answer.
PRINT = ("cli/", "server/supervisor.py")
NOT_OURS = ("server/cpu_stand_ins/", "server/sglang_plugin/")  # these run in SGLang's processes


class Use(NamedTuple):
    """A dotted name of another module, as used somewhere: through an import, or an attribute of something imported."""

    name: str
    line: int
    is_import: bool
    at_run_time: bool


def violations(root: Path) -> list[str]:
    """Every breach in the tree under ``root`` as ``file:line: what is wrong``."""
    found: list[str] = []
    graph: dict[str, set[str]] = {}
    package = root / PACKAGE
    for file in sorted(package.rglob("*.py")):
        path = file.relative_to(package).as_posix()
        if path.startswith(NOT_OURS):
            continue
        tree = ast.parse(file.read_text(), filename=str(file))
        uses = list(uses_of(tree))
        graph[module_name(path)] = {use.name for use in uses if use.is_import and use.at_run_time}
        breaches = (*import_breaches(path, uses), *sublayer_breaches(path, uses), *habit_breaches(path, tree, uses))
        for line, message in breaches:
            found.append(f"{PACKAGE}/{path}:{line}: {message}")
    found += [f"{PACKAGE}: import cycle {' -> '.join(cycle)}" for cycle in cycles(graph)]
    for folder in ("examples", "tutorials"):
        for file in sorted((root / folder).rglob("*.py")):
            for use in uses_of(ast.parse(file.read_text(), filename=str(file))):
                if use.is_import and use.name.startswith(f"{PACKAGE}.") and use.name.count(".") > 1:
                    where = file.relative_to(root).as_posix()
                    found.append(
                        f"{where}:{use.line}: imports {use.name}: only names of the package root are for users"
                    )
    return found


def module_name(path: str) -> str:
    return ".".join((PACKAGE, *Path(path).with_suffix("").parts)).removesuffix(".__init__")


def uses_of(tree: ast.Module) -> Iterator[Use]:
    """Imports, and attribute chains that start at an imported name, with the name they had where they come from."""
    typing_only = {id(node) for block in typing_blocks(tree) for node in ast.walk(block)}
    origin: dict[str, str] = {}
    for node in ast.walk(tree):
        at_run_time = id(node) not in typing_only
        if isinstance(node, ast.Import):
            for alias in node.names:
                origin[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                yield Use(alias.name, node.lineno, True, at_run_time)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for alias in node.names:
                origin[alias.asname or alias.name] = f"{module}.{alias.name}"
                yield Use(f"{module}.{alias.name}", node.lineno, True, at_run_time)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            chain = dotted(node)
            if chain and chain.split(".")[0] in origin:
                first, rest = chain.split(".", 1)
                yield Use(f"{origin[first]}.{rest}", node.lineno, False, True)
        elif isinstance(node, ast.Call) and (dotted(node.func) or "").split(".")[-1] in ("import_module", "__import__"):
            names = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            yield from (Use(name, node.lineno, True, True) for name in names)


def typing_blocks(tree: ast.Module) -> Iterator[ast.If]:
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and (dotted(node.test) or "").endswith("TYPE_CHECKING"):
            yield node


def dotted(node: ast.AST) -> str | None:
    """``a.b.c`` for an attribute chain on a plain name, else ``None``."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = dotted(node.value)
        return f"{head}.{node.attr}" if head else None
    return None


def import_breaches(path: str, uses: list[Use]) -> Iterator[tuple[int, str]]:
    unit = Path(path).parts[0].removesuffix(".py")
    if unit != "__init__" and unit not in LAYER_OF:
        yield 1, f"{unit} has no place among the layers: give it one in tests/test_architecture.py, as low as it can be"
        return
    for use in uses:
        if use.is_import and use.name.startswith("."):
            yield use.line, "relative import: write the whole name"
        if use.is_import and use.name.split(".")[0] == "sglang":
            yield use.line, "imports sglang: the server is launched, never imported"
        if use.is_import and use.name.split(".")[0] == PACKAGE and unit != "__init__":
            other = use.name.split(".")[1] if "." in use.name else ""
            if other not in LAYER_OF:
                yield use.line, "imports the package root: name the module that defines it"
            elif not may_import(unit, other):
                yield use.line, f"{unit} imports {other}, which lies above it or beside it"
        for roots, allowed in PRIVATE_NAMES_ALLOWED.items():
            if path not in allowed and is_private_of(use.name, roots):
                yield use.line, f"private name {use.name}: such names live in {', '.join(sorted(allowed))} alone"


def sublayer_breaches(path: str, uses: list[Use]) -> Iterator[tuple[int, str]]:
    """Imports inside a package of ``SUBLAYERS`` that go up, or to the package's own ``__init__``."""
    package, _, rest = path.partition("/")
    layers = SUBLAYERS.get(package)
    own = Path(rest).parts[0].removesuffix(".py") if rest else ""
    if layers is None or own in ("", "__init__"):
        return
    if own not in layers:
        yield 1, f"{own} has no place among the layers of {package}: add it to SUBLAYERS in tests/test_architecture.py"
        return
    for use in uses:
        parts = use.name.split(".")
        if not use.is_import or parts[:2] != [PACKAGE, package]:
            continue
        other = parts[2] if len(parts) > 2 else ""
        if other not in layers:
            yield use.line, f"imports {package} itself: name the module that defines it"
        elif layers.index(other) > layers.index(own):
            yield use.line, f"{package}/{own} imports {package}/{other}, which lies above it"


def may_import(unit: str, other: str) -> bool:
    if unit == other or LAYER_OF[other] < LAYER_OF[unit]:
        return True
    return {unit, other} <= PEERS and {unit, other} != NEVER_MEET


def is_private_of(name: str, roots: tuple[str, ...]) -> bool:
    if not any(name == root or name.startswith(f"{root}.") for root in roots):
        return False
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def habit_breaches(path: str, tree: ast.Module, uses: list[Use]) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            message = handler_breach(node)
            if message:
                yield node.lineno, message
        if isinstance(node, ast.Call) and dotted(node.func) == "print" and not path.startswith(PRINT):
            yield node.lineno, "print in the library: log, or take a progress callback"
        for target in written_targets(node):
            if isinstance(target, ast.Subscript) and (dotted(target.value) or "").endswith("environ"):
                yield node.lineno, "writes os.environ: a child process gets its own copy"
    for use in uses:
        if use.name in ENVIRONMENT_WRITERS:
            yield use.line, f"{use.name} writes the environment: a child process gets its own copy"


ENVIRONMENT_WRITERS = {f"os.environ.{name}" for name in ("update", "setdefault", "pop", "popitem", "clear")}
ENVIRONMENT_WRITERS |= {"os.putenv", "os.unsetenv"}


def handler_breach(handler: ast.ExceptHandler) -> str | None:
    if handler.type is None:
        return "bare except: name what can happen"
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    names = {dotted(node) for node in caught}
    if "Exception" in names:
        return "except Exception: name what can happen"
    if "BaseException" in names and not any(passes_on(node, handler.name) for node in ast.walk(handler)):
        return "except BaseException that neither raises it again nor hands it to another thread"
    return None


def passes_on(node: ast.AST, error: str | None) -> bool:
    """``raise``, ``self._raise(error)``, ``kept = error`` or ``future.set_exception(error)``."""
    if isinstance(node, ast.Raise):
        return node.exc is None
    if isinstance(node, ast.Assign):
        return error is not None and dotted(node.value) == error
    is_handing_over = isinstance(node, ast.Call) and (dotted(node.func) or "").endswith((".set_exception", "_raise"))
    return is_handing_over and [dotted(argument) for argument in node.args] == [error]


def written_targets(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, (ast.Assign, ast.Delete)):
        return node.targets
    return [node.target] if isinstance(node, (ast.AugAssign, ast.AnnAssign)) else []


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Import cycles between modules, each once, as the modules along it."""
    edges = {
        module: {target for name in names for target in [longest_module(name, graph)] if target and target != module}
        for module, names in graph.items()
        if module != PACKAGE
    }
    found: list[list[str]] = []
    finished: set[str] = set()

    def visit(module: str, trail: list[str]) -> None:
        if module in trail:
            found.append([*trail[trail.index(module) :], module])
        elif module not in finished:
            for target in sorted(edges.get(module, ())):
                visit(target, [*trail, module])
            finished.add(module)

    for module in sorted(edges):
        visit(module, [])
    return found


def longest_module(name: str, graph: dict[str, set[str]]) -> str | None:
    while name and name not in graph:
        name = name.rpartition(".")[0]
    return name if name != PACKAGE else None


# ------------------------------------------------------------------------------------------------------------- tests


def test_this_repository_keeps_its_own_rules():
    assert len(list((ROOT / PACKAGE).rglob("*.py"))) > 10, "the checker looks in the wrong place"
    assert "\n".join(violations(ROOT)) == ""


BREACHES = {
    "a lower layer imports a higher one": (
        "client.py",
        "from torchrl_sglang.pool import SGLangPool",
        "client imports pool",
    ),
    "errors import anything of ours": ("errors.py", "import torchrl_sglang.config", "errors imports config"),
    "rollout imports weights": (
        "rollout/policy.py",
        "from torchrl_sglang.weights import scheme",
        "rollout imports weights",
    ),
    "weights import rollout, for types only": (
        "weights/scheme.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from torchrl_sglang.rollout import policy",
        "weights imports rollout",
    ),
    "pool imports server": ("pool.py", "from torchrl_sglang.server import SGLangServer", "pool imports server"),
    "the library imports its own testing tools": (
        "engine.py",
        "from torchrl_sglang.testing import models",
        "engine imports testing",
    ),
    "a module imports the package root": (
        "pool.py",
        "from torchrl_sglang import SGLangClient",
        "imports the package root",
    ),
    "a lower layer of a package imports a higher one": (
        "recipes/setup/serving.py",
        "from torchrl_sglang.recipes.run.checkpoints import Checkpoint",
        "recipes/setup imports recipes/run",
    ),
    "a lower layer of a package imports a higher one, for types only": (
        "recipes/data/tasks.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torchrl_sglang.recipes.batch.sequences",
        "recipes/data imports recipes/batch",
    ),
    "a layer of a package imports the package itself": (
        "recipes/tools/episodes.py",
        "from torchrl_sglang.recipes import Task",
        "imports recipes itself",
    ),
    "a folder without a layer in its package": ("recipes/helpers/text.py", "", "helpers has no place among the layers"),
    "a relative import": ("pool.py", "from .client import SGLangClient", "relative import"),
    "a unit without a layer": ("helpers.py", "", "helpers has no place"),
    "sglang imported": ("server/server.py", "import sglang.srt", "imports sglang"),
    "sglang imported by name": ("engine.py", "import importlib\nimportlib.import_module('sglang')", "imports sglang"),
    "private torch.distributed name, imported": (
        "weights/update/session.py",
        "from torch.distributed.distributed_c10d import _world",
        "private name torch.distributed.distributed_c10d._world",
    ),
    "private torch.distributed name, by attribute": (
        "weights/update/session.py",
        "import torch.distributed as dist\ndist._functional_collectives.broadcast()",
        "private name torch.distributed._functional_collectives",
    ),
    "private torchrl module": (
        "rollout/prompts.py",
        "from torchrl._utils import logger",
        "private name torchrl._utils.logger",
    ),
    "private torchrl name through an alias": (
        "pool.py",
        "import torchrl as rl\nrl.collectors._base.x",
        "private name torchrl.collectors._base",
    ),
    "bare except": ("pool.py", "try:\n    pass\nexcept:\n    pass", "bare except"),
    "except Exception": ("pool.py", "try:\n    pass\nexcept (OSError, Exception):\n    raise", "except Exception"),
    "a swallowed BaseException": ("pool.py", "try:\n    pass\nexcept BaseException:\n    pass", "except BaseException"),
    "a BaseException that is only looked at": (
        "pool.py",
        "try:\n    pass\nexcept BaseException as error:\n    log(error)",
        "except BaseException",
    ),
    "print": ("engine.py", "print('here')", "print in the library"),
    "an environment variable set": ("engine.py", "import os\nos.environ['A'] = '1'", "writes os.environ"),
    "an environment variable removed": ("engine.py", "from os import environ\ndel environ['A']", "writes os.environ"),
    "the environment updated": ("engine.py", "import os\nos.environ.update(A='1')", "os.environ.update writes"),
    "putenv": ("engine.py", "from os import putenv\nputenv('A', '1')", "os.putenv writes"),
    "an example reaching inside": (
        "../examples/grpo.py",
        "from torchrl_sglang.rollout.policy import SGLangWrapper",
        "only names of the package root",
    ),
    "a tutorial reaching inside": (
        "../tutorials/first.py",
        "import torchrl_sglang.pool.balance",
        "only names of the package root",
    ),
}


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for path, source in files.items():
        file = root / PACKAGE / path
        file.parent.mkdir(parents=True, exist_ok=True)
        (root / PACKAGE).mkdir(exist_ok=True)
        file.write_text(source + "\n")
    return root


@pytest.mark.parametrize("name", BREACHES)
def test_the_checker_finds(name: str, tmp_path: Path):
    path, source, expected = BREACHES[name]
    (tmp_path / PACKAGE).mkdir()
    found = violations(write_tree(tmp_path, {path: source}))
    assert found, "nothing was found"
    assert any(expected in message for message in found), found


def test_the_checker_finds_an_import_cycle_and_leaves_typing_imports_out_of_it(tmp_path: Path):
    files = {
        "protocol/__init__.py": "",
        "protocol/a.py": "from torchrl_sglang.protocol.b import thing",
        "protocol/b.py": "def late():\n    from torchrl_sglang.protocol import a",
    }
    a, b = f"{PACKAGE}.protocol.a", f"{PACKAGE}.protocol.b"
    assert violations(write_tree(tmp_path, files)) == [f"{PACKAGE}: import cycle {a} -> {b} -> {a}"]
    files["protocol/b.py"] = "import typing\nif typing.TYPE_CHECKING:\n    from torchrl_sglang.protocol import a"
    assert violations(write_tree(tmp_path, files)) == []


def test_the_checker_accepts_what_is_allowed(tmp_path: Path):
    files = {
        "__init__.py": "from torchrl_sglang.pool import SGLangPool\nfrom torchrl_sglang.engine import AsyncSGLang",
        "parallel.py": "try:\n    pass\nexcept BaseException as error:\n    kept = error",
        "pool.py": "from torchrl_sglang.client import SGLangClient\ntry:\n    pass\nexcept BaseException:\n    raise",
        "pool/streaming.py": "try:\n    pass\nexcept BaseException as error:\n    future.set_exception(error)",
        "client.py": "import os\nenv = dict(os.environ)\nenv['A'] = '1'\nenv.update(B='2')",
        "engine.py": "from torchrl_sglang.weights import scheme\nfrom torchrl_sglang.server import SGLangServer",
        "weights/group/process_group.py": "from torch.distributed.distributed_c10d import _world",
        "weights/scheme.py": "from torchrl._utils import logger\nimport torch.distributed",
        "server/cpu_stand_ins/triton/__init__.py": "import sglang\nprint('not ours')",
        "cli/chat.py": "from torchrl_sglang.testing import models\nprint(models)",
        "testing/models.py": "from torchrl_sglang.engine import AsyncSGLang",
        "recipes/__init__.py": "from torchrl_sglang.recipes.run.table import Table",
        "recipes/run/table.py": "import torchrl_sglang.recipes.setup.memory\nimport torchrl_sglang.recipes.run.clock",
        "recipes/run/clock.py": "",
        "recipes/setup/memory.py": "from torchrl_sglang.errors import ConfigError",
        "../examples/grpo.py": "from torchrl_sglang import AsyncSGLang, testing\nprint(testing.models.x, __name__)",
    }
    assert violations(write_tree(tmp_path, files)) == []
