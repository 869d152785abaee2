"""A plugin of SGLang: bad tensors in ``/update_weights_from_tensor`` are answered with an error, and end nothing.

SGLang (0.5.20 to 0.5.23) lets such an error end the scheduler, and the whole server with it, where the same error in
``/update_weights_from_distributed`` is answered with status 400. With this plugin both are answered.

SGLang finds the plugin by the metadata in the folder beside this file and calls :func:`answer_errors` in each of its
processes. This module is imported by the server's Python alone, which may not have torchrl-sglang.
"""

import functools
import logging
import sys

_SCHEDULER = "sglang.srt.managers.scheduler"
_READ, _LOAD = "deserialize_own_rank", "update_weights_from_tensor"
_PLACES = {_READ: "sglang.srt.managers.tp_worker", _LOAD: "sglang.srt.model_executor"}
_log = logging.getLogger(__name__)


class Unreadable(list):
    """What a rank has instead of tensors that it could not read."""

    def __init__(self, error):
        super().__init__()
        self.error = error


def answer_errors():
    """In a scheduler's process, wrap what reads and loads a payload as soon as the scheduler exists.

    Its modules are imported only while it is made; other processes have none.
    """
    scheduler = getattr(sys.modules.get(_SCHEDULER), "Scheduler", None)
    if scheduler is not None:
        _wrap(scheduler, "__init__", _making)


def wrap_methods():
    """Wrap the methods that read and load a payload, in every class that defines them."""
    for method, wrap in ((_READ, _reading), (_LOAD, _loading)):
        for name, module in list(sys.modules.items()):
            if name.startswith(_PLACES[method]):
                for found in list(vars(module).values()):
                    if isinstance(found, type) and found.__module__ == name and method in vars(found):
                        _wrap(found, method, wrap)


def _wrap(owner, method, wrap):
    original = vars(owner)[method]
    if not hasattr(original, "_answers_errors"):
        wrapped = wrap(original)
        wrapped._answers_errors = True
        setattr(owner, method, wrapped)


def _making(original):
    @functools.wraps(original)
    def make(self, *args, **kwargs):
        original(self, *args, **kwargs)
        wrap_methods()

    return make


def _reading(original):
    @functools.wraps(original)
    def read(self, *args, **kwargs):
        try:
            return original(self, *args, **kwargs)
        except Exception as error:  # noqa: BLE001  an answer to the client, whatever it is
            _log.exception("the tensors of a weight update can't be read")
            return Unreadable(error)  # every rank goes on to the barrier at the end of the request

    return read


def _loading(original):
    @functools.wraps(original)
    def load(self, named_tensors, *args, **kwargs):
        if isinstance(named_tensors, Unreadable):
            return False, f"Failed to read the tensors: {named_tensors.error}"
        try:
            return original(self, named_tensors, *args, **kwargs)
        except Exception as error:  # noqa: BLE001  an answer to the client, whatever it is
            _log.exception("the tensors of a weight update can't be loaded")
            return False, f"Failed to load the tensors: {error}. The weights may be partially updated."

    return load
