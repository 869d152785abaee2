"""Reserves free ports until the server binds them, also when several servers start at the same moment.

SGLang binds its HTTP port after the model is loaded, which takes minutes for a large one. Until then the reservation is
a socket in Linux's abstract namespace whose name holds the port: it belongs to the same network namespace as the port,
all users see it, and the kernel removes it when its owner dies.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
from pathlib import Path

from torchrl_sglang.server.supervisor import tree_pids

__all__ = ["PortReservation", "is_bindable", "listens_on", "reserve_port"]

# Below the kernel's range for outgoing connections, so that no client takes a port that was picked here.
_FIRST_PORT, _LAST_PORT = 20000, 29999
_LISTEN_STATE = "0A"


class PortReservation:
    """A port that :func:`reserve_port` gives to nobody else until :meth:`close` or the end of this process."""

    def __init__(self, port: int, held: socket.socket) -> None:
        self.port = port
        self._held = held

    def close(self) -> None:
        """Release the port."""
        self._held.close()


def is_bindable(host: str, port: int) -> bool:
    """Whether a server could listen on this address now."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As the server does: a port whose last connections are in TIME_WAIT counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError:
        return False
    return True


def _hold(port: int) -> socket.socket | None:
    held = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        held.bind(f"\0torchrl-sglang-port-{port}")
    except OSError:
        held.close()
        return None
    return held


def reserve_port(host: str = "0.0.0.0", port: int | None = None) -> PortReservation | None:
    """Reserve ``port``, or a free one when it is ``None``.

    Returns:
        The reservation; ``None`` when the port is in use or reserved.

    Examples:
        >>> first = reserve_port("127.0.0.1")
        >>> reserve_port("127.0.0.1", first.port) is None
        True
        >>> first.close()
        >>> again = reserve_port("127.0.0.1", first.port)
        >>> again.port == first.port
        True
        >>> again.close()
    """
    candidates = [port] if port is not None else random.sample(range(_FIRST_PORT, _LAST_PORT + 1), 256)
    for candidate in candidates:
        held = _hold(candidate)
        if held is None:
            continue
        # A port that is picked here must be free on every interface, not only on `host`.
        if is_bindable(host, candidate) and (port is not None or is_bindable("0.0.0.0", candidate)):
            return PortReservation(candidate, held)
        held.close()
    return None


def listens_on(root_pid: int, port: int) -> bool:
    """Whether a descendant of ``root_pid`` listens on ``port``.

    Another program may have taken the port while the server was loading, and would answer in its place.
    """
    inodes = _listening_inodes(port)
    for pid in tree_pids(root_pid):
        with contextlib.suppress(OSError):  # the process ended, or the file was closed, meanwhile
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(link) in inodes:  # noqa: PTH115
                        return True
    return False


def _listening_inodes(port: int) -> set[str]:
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
            for line in Path(table).read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == _LISTEN_STATE and int(words[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{words[9]}]")
    return inodes
