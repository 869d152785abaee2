"""File descriptors of a gateway: each agent's connection takes one, and each request under way to a server another."""

from __future__ import annotations

import errno
import logging
import os
import resource
from contextlib import suppress

__all__ = ["RESERVE", "DescriptorReserve", "is_out_of_files", "raise_limit", "warn_of_low_limit"]

_log = logging.getLogger(__name__)

_OUT_OF_FILES = {errno.EMFILE, errno.ENFILE}
_RESERVED = 32
_LOW_LIMIT = 1024


class DescriptorReserve:
    """Descriptors that are held for connections to servers: agents that connect must not take them all.

    Without them agents would wait for answers that no request can be sent for. Thread-safe as lists are.

    Args:
        size: how many are held.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._held: list[int] = []

    def fill(self) -> None:
        """Hold as many as there are, up to the size."""
        with suppress(OSError):
            while len(self._held) < self._size:
                self._held.append(os.open(os.devnull, os.O_RDONLY))

    def release(self) -> bool:
        """Give one up; whether there was one."""
        try:
            os.close(self._held.pop())
        except IndexError:
            return False
        return True

    def empty(self) -> None:
        """Give up all."""
        while self.release():
            pass


RESERVE = DescriptorReserve(_RESERVED)
"""That of this process: its gateways share it, and fill it again while they run."""


def is_out_of_files(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, says that this process or machine has no free descriptor."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno in _OUT_OF_FILES:
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def raise_limit() -> None:
    """Let this process open as many files as its hard limit allows. For processes that do nothing but serve agents."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):  # a hard limit above the kernel's, in some containers
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def warn_of_low_limit() -> None:
    """Say so in the log where few agents fit."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit != resource.RLIM_INFINITY and limit < _LOW_LIMIT:
        _log.warning(
            "this process may open %d files, and each agent at a time takes two in the gateway: raise the limit "
            "(ulimit -n 65536) before it starts",
            limit,
        )
