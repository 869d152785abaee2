"""A plugin of SGLang: a rank waits for a trainer of torchrl-sglang only as long as the name of the process group says.

SGLang (0.5.20 to 0.5.23) makes the group of ``/init_weights_update_group`` with torch's default time-out, 30 minutes,
both for joining and for every broadcast; no flag, variable or field of the request changes it. A rank whose trainer's
machine has vanished blocks its whole server for that time. The group's name has the trainer's own limit as its last
part, ``torchrl-sglang-OWNER.COUNT.SECONDS``; groups of other names keep their time-out.

SGLang finds the plugin by the metadata in the folder beside this file and calls :func:`bound_waits` in each of its
processes. This module is imported by the server's Python alone, which may not have torchrl-sglang.
"""

import functools
import re
import sys
from datetime import timedelta

_NAME = re.compile(r"torchrl-sglang-[^.]*\.\d+\.(\d+)")
_MAKER = "init_custom_process_group"


def bound_waits():
    """Give ``init_custom_process_group`` the time-out of the group's name, wherever it was imported."""
    holders = [module for module in list(sys.modules.values()) if _MAKER in getattr(module, "__dict__", ())]
    wrappers = {}
    for holder in holders:
        original = vars(holder)[_MAKER]
        if not hasattr(original, "__wrapped__"):
            setattr(holder, _MAKER, wrappers.setdefault(original, _with_limit(original)))


def limit_s(group_name):
    """The limit in seconds that a group's name states; ``None`` if it states none.

    Examples:
        >>> limit_s("torchrl-sglang-a1b2c3d4.2.91"), limit_s("weight_update_group"), limit_s(None)
        (91, None, None)
    """
    found = _NAME.fullmatch(group_name or "")
    return int(found[1]) if found else None


def _with_limit(make_group):
    @functools.wraps(make_group)
    def make_with_limit(*args, **kwargs):
        seconds = limit_s(kwargs.get("group_name"))
        if seconds is not None and kwargs.get("timeout") is None:
            kwargs["timeout"] = timedelta(seconds=seconds)
        return make_group(*args, **kwargs)

    return make_with_limit
