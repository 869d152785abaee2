"""Forms a weight group: hosts the store, tells the servers to join, and names those that did not arrive."""

from __future__ import annotations

import errno
import ipaddress
import math
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SyncConfig
from torchrl_sglang.errors import ConfigError, RequestRejectedError, ServerWeights, SGLangError, WeightUpdateError
from torchrl_sglang.parallel import Outcome, Task
from torchrl_sglang.protocol.control import build_init_group, check_success

__all__ = [
    "JoinCall",
    "Rendezvous",
    "ask_to_join",
    "await_ranks",
    "check_join",
    "group_mark",
    "group_name",
    "reachable_address",
]

_POLL_S = 0.005
_MARGIN_S = 2.0
_PORT_TIMEOUT_S = 5.0
_LONGER_THAN_OURS_S = 30
"""A rank that waits for the trainer gives up this much later than the trainer: by then the trainer has said why."""


def group_mark(owner: str, count: int, limit_s: float) -> str:
    """Names the groups of an update: whose they are, the how many-th, and the seconds after which a rank gives up.

    SGLang's requests have no field for that time, and its ranks wait for torch's 30 minutes. In launched servers
    (``server/sglang_plugin``) they wait for the time in the group's name.

    Examples:
        >>> group_name(group_mark("a1b2c3d4", 2, 60.5))
        'torchrl-sglang-a1b2c3d4.2.91'
    """
    return f"{owner}.{count}.{math.ceil(limit_s) + _LONGER_THAN_OURS_S}"


def group_name(mark: str) -> str:
    """Name of the group of an update (:attr:`TrainerMark.group`)."""
    return f"torchrl-sglang-{mark}"


class Rendezvous:
    """Hosts the store that trainer and servers join, on an address and port that stay bound throughout.

    After a failure, servers that wait at the store are released when it is closed, but one that arrives even later
    retries the closed port until torch's own time-out (30 minutes). So the store stays open until every server that
    will arrive has arrived. Nothing else may keep it open: the frames of a traceback live as long as the error does.

    Args:
        name: the group's name.
        address: of this machine, as the servers reach it.
        port: ``None`` picks a free one.
        timeout_s: longest wait of a call to the store.

    Raises:
        ConfigError: the address or port can't be listened on.
    """

    def __init__(self, name: str, address: str, port: int | None, *, timeout_s: float) -> None:
        self.name = name
        self.address = address
        listener = _listen(address, port)
        self.port = int(listener.getsockname()[1])
        self.store: Any = dist.TCPStore(  # type: ignore[attr-defined]
            address,
            self.port,
            None,
            True,
            timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )

    def __str__(self) -> str:
        return f"{self.address}:{self.port}"

    def prefixed(self, backend: str) -> c10d.Store:
        """The store as SGLang's ranks see it."""
        kind = "cuda/" if backend == "nccl" else "cpu/"
        return c10d.PrefixStore(kind, c10d.PrefixStore(f"{self.name}/", c10d.PrefixStore(self.name, self.store)))

    def end(self) -> None:
        """Close the store, unless a process group uses it."""
        self.store = None

    def abandon(self, joins: Sequence[JoinCall], backend: str, deadline: float) -> None:
        """Close the store as soon as every server that will still arrive has arrived; returns at once."""

        def wait_and_end() -> None:
            end = deadline if backend == "gloo" else time.monotonic() + _MARGIN_S
            while time.monotonic() < end:
                if backend == "gloo" and all(join.task.done or self.has([join]) for join in joins):
                    break
                time.sleep(_POLL_S)
            self.end()

        Task(wait_and_end, name=f"end-rendezvous-{self.name}")

    def has(self, joins: Sequence[JoinCall]) -> bool:
        """Whether all ranks of these servers have written their keys of this group (gloo only).

        The store may hold others: a server that was told to join an earlier group on this port may arrive late.
        """
        return bool(self.prefixed("gloo").check([f"0/{rank}" for join in joins for rank in join.ranks]))


def _listen(address: str, port: int | None) -> socket.socket:
    """Listen on one address only. Waits for a port that an earlier group of this trainer is about to release."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    deadline = time.monotonic() + _PORT_TIMEOUT_S
    while True:
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, port or 0))
            listener.listen(512)
            return listener
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise ConfigError(
                    f"can't listen on {address}:{port or 'any port'} ({error.strerror}): set SyncConfig.master_address "
                    "to an address of this machine that the servers reach, and master_port to a free port (or None)"
                ) from error
        time.sleep(_POLL_S)


@dataclass(frozen=True, slots=True)
class JoinCall:
    """A server that was told to join, its ranks, and the call that tells it."""

    client: SGLangClient
    ranks: range
    task: Task[Any]


def ask_to_join(
    clients: Sequence[SGLangClient], rendezvous: Rendezvous, world_size: int, backend: str, config: SyncConfig
) -> list[JoinCall]:
    """Tell every server to join. The calls run in threads; :func:`await_ranks` waits for them."""
    joins: list[JoinCall] = []
    first = 1
    for client in clients:
        request = build_init_group(
            address=rendezvous.address,
            port=rendezvous.port,
            rank_offset=first,
            world_size=world_size,
            name=rendezvous.name,
            backend=backend,
        )
        # Longer than await_ranks: its error names the missing servers, a time-out of one call does not.
        call = partial(client.send, request, timeout_s=config.group_limit_s(world_size) + _MARGIN_S)
        ranks = range(first, first + client.info.tp_size)
        joins.append(JoinCall(client, ranks, Task(call, name=f"join-{client.url}")))
        first = ranks.stop
    return joins


def await_ranks(rendezvous: Rendezvous, joins: Sequence[JoinCall], backend: str, deadline: float) -> None:
    """Wait until every rank has arrived at the store, so that joining can't block on one that never arrives.

    Each gloo rank writes one key. NCCL ranks write none; they answer the HTTP call instead.

    Raises:
        WeightUpdateError: a server refused, died, or did not arrive by ``deadline`` (``time.monotonic()``).
    """
    while True:
        if backend == "gloo":
            arrived = rendezvous.has(joins)
        else:
            arrived = all(join.task.done for join in joins)
        for join in joins:
            if join.task.done:
                check_join(join, deadline, rendezvous)
        if arrived:
            return
        if time.monotonic() > deadline:
            raise _not_arrived(rendezvous, joins, backend)
        time.sleep(_POLL_S)


def _not_arrived(rendezvous: Rendezvous, joins: Sequence[JoinCall], backend: str) -> WeightUpdateError:
    absent = [join.client.url for join in joins if not join.task.done]
    if backend == "gloo":
        absent = [join.client.url for join in joins if not rendezvous.has([join])]
    return WeightUpdateError(
        f"the weight group did not form within its time: {', '.join(absent) or 'nobody'} did not arrive at "
        f"{rendezvous}. Can the servers reach that address? Set SyncConfig.master_address to an address of the "
        "trainer that they reach, or raise group_timeout_s. Or is a server still stuck in the collective of a trainer "
        "that died? Restart it",
        server_weights={join.client.url: "stuck" if join.client.url in absent else "old" for join in joins},
    )


def check_join(join: JoinCall, deadline: float, rendezvous: Rendezvous) -> None:
    """Wait for a server's answer to the call that told it to join.

    Raises:
        WeightUpdateError: it refused, or did not answer.
    """
    url = join.client.url
    if not join.task.wait(max(0.0, deadline - time.monotonic())):
        raise WeightUpdateError(f"{url} did not answer while joining the weight group", server_weights={url: "stuck"})
    outcome: Outcome[Any] = join.task.outcome()
    try:
        check_success(outcome.unwrap(), server=url, what="joining the weight group")
    except SGLangError as error:
        state: ServerWeights = "old" if isinstance(error, RequestRejectedError) else "stuck"
        raise WeightUpdateError(
            f"{url} could not join the weight group at {rendezvous}: {error}. No weights were touched",
            server_weights={url: state},
        ) from error


def reachable_address(urls: Sequence[str]) -> str:
    """The address of this machine's interface that leads to the servers.

    A loopback address only when every server is on this machine.

    Examples:
        >>> reachable_address(["http://127.0.0.1:30000"])
        '127.0.0.1'
    """
    local = "127.0.0.1"
    for url in urls:
        parts = urlsplit(url)
        host = parts.hostname or "127.0.0.1"
        family, _, _, _, target = socket.getaddrinfo(host, parts.port or 80, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # a datagram socket sends nothing, it only picks the route
            address = str(probe.getsockname()[0])
        if not ipaddress.ip_address(address.split("%")[0]).is_loopback:
            return address
        local = address
    return local
