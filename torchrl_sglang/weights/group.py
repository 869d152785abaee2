"""The trainer's side of the weight group: rank 0 of a process group whose other ranks live inside the servers.

Server ``i`` holds ranks ``offset_i .. offset_i + tp_size_i - 1``. The group is made from torch's public classes, with
the store prefixes that SGLang's own helper uses, and never touches the trainer's default process group.

This is the one place that knows where NCCL differs from gloo (read in SGLang's source, not yet run on GPUs):

* gloo connects when the group is made, so a 200 from every server proves the ranks meet; NCCL connects at the first
  broadcast, so the first bucket has the group's own deadline;
* a gloo broadcast that returned has been sent; an NCCL broadcast is only enqueued, and its work handle says when the
  buffer is free again;
* gloo can't abort an operation under way, it ends at the operation's own time-out; NCCL aborts at once, but its
  watchdog would kill the trainer's process first if the group's time-out were shorter than ours.
"""

from __future__ import annotations

import ipaddress
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SyncConfig
from torchrl_sglang.errors import ConfigError, SGLangError, WeightUpdateError
from torchrl_sglang.parallel import Outcome, Task
from torchrl_sglang.protocol.control import build_destroy_group, build_init_group, check_success

__all__ = ["WeightGroup", "reachable_address"]

_POLL_S = 0.005


class WeightGroup:
    """A process group of the trainer (rank 0) and every rank of the given servers. Use :meth:`form`.

    Attributes:
        name: the group's name on the servers, unique to this group.
        clients: the servers in it.
        backend: ``"gloo"`` or ``"nccl"``.
        world_size: number of ranks, the trainer's included.
    """

    def __init__(self, name: str, clients: Sequence[SGLangClient], backend: str, world_size: int, group: Any) -> None:
        self.name = name
        self.clients = tuple(clients)
        self.backend = backend
        self.world_size = world_size
        self._group = group

    @classmethod
    def form(cls, clients: Sequence[SGLangClient], config: SyncConfig) -> WeightGroup:
        """Make the group: every server is told to join, and the trainer joins with them.

        Args:
            clients: the servers; each contributes ``tp_size`` ranks.
            config: address, port, backend and time-outs.

        Raises:
            ConfigError: the address can't be listened on, or the servers could not reach it.
            WeightUpdateError: a server refused, died or did not join in time; no server's weights were touched.
        """
        backend = _choose_backend(config, clients)
        address = config.master_address or reachable_address([client.url for client in clients])
        world_size = 1 + sum(client.info.tp_size for client in clients)
        name = f"torchrl-sglang-{uuid.uuid4().hex[:12]}"
        timeout = timedelta(seconds=config.group_timeout_s)
        store, port = _listen(address, config.master_port, timeout)
        joins = _ask_to_join(clients, name=name, address=address, port=port, world_size=world_size, backend=backend)
        deadline = time.monotonic() + config.group_timeout_s
        try:
            _await_ranks(store, joins, world_size, backend, deadline, address=address, port=port)
            prefix = "cuda/" if backend == "nccl" else "cpu/"
            prefixed = c10d.PrefixStore(prefix, c10d.PrefixStore(f"{name}/", c10d.PrefixStore(name, store)))
            group = _join(prefixed, world_size, backend, address, config)
            for url, task in joins.items():
                _check_join(url, task, deadline, address=address, port=port)
        except BaseException:
            # Servers that wait for the others at the store are released when it goes away.
            del store
            raise
        return cls(name, clients, backend, world_size, group)

    @property
    def device(self) -> torch.device:
        """Where tensors have to be to be broadcast: the trainer's current GPU for NCCL, the CPU for gloo."""
        return torch.device("cuda", torch.cuda.current_device()) if self.backend == "nccl" else torch.device("cpu")

    def broadcast(self, tensor: torch.Tensor, *, timeout_s: float) -> None:
        """Send a tensor from rank 0 to all others and wait until its memory may be written again.

        Args:
            tensor: contiguous, on the trainer's device (CPU for gloo).
            timeout_s: seconds after which the operation is given up.

        Raises:
            WeightUpdateError: a peer is gone or did not take part in time.
        """
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        options.timeout = timedelta(seconds=timeout_s)
        try:
            work = self._group.broadcast([tensor], options)
            if self.backend == "nccl":
                self._await_enqueued(work, timeout_s)
            else:
                work.wait()
        except RuntimeError as error:
            raise WeightUpdateError(f"the {self.backend} broadcast of {tensor.nbytes} bytes failed: {error}") from error

    def _await_enqueued(self, work: Any, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not work.is_completed():
            if time.monotonic() > deadline:
                self._group.abort()
                raise WeightUpdateError(f"the NCCL broadcast did not finish within {timeout_s:g} s and was aborted")
            time.sleep(_POLL_S / 10)

    def close(self) -> None:
        """Take the group down on both sides; a server that can't answer is left to its own time-out."""
        tasks = {
            client.url: Task(_bind_send(client, build_destroy_group(self.name)), name="destroy-group")
            for client in self.clients
        }
        for task in tasks.values():
            task.wait(2.0)
        self.drop()

    def drop(self) -> None:
        """Let go of the trainer's side only, without blocking.

        gloo waits for an operation under way when it is destroyed, so the last reference is given up in a thread.
        """
        if self._group is not None:
            release = _Release(self._group, self.backend)
            self._group = None  # no name in this thread may hold it any more: the last one to let go waits
            Task(release, name="drop-weight-group")


class _Release:
    """Holds the last reference to a group until its thread has ended it."""

    def __init__(self, group: Any, backend: str) -> None:
        self._group = group
        self._backend = backend

    def __call__(self) -> None:
        if self._backend == "nccl":
            self._group.abort()
        self._group = None


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


def _choose_backend(config: SyncConfig, clients: Sequence[SGLangClient]) -> str:
    if config.backend != "auto":
        return config.backend
    devices = {client.info.device for client in clients}
    if devices == {"cpu"}:
        return "gloo"
    if "cpu" in devices:
        raise ConfigError(f"the servers run on different devices ({sorted(devices)}): one group can't hold them")
    return "nccl"


def _listen(address: str, port: int | None, timeout: timedelta) -> tuple[c10d.Store, int]:
    """A store that listens on one address only, on a port that nobody can take in between."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port or 0))
        listener.listen(512)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"can't listen on {address}:{port or 'any port'} ({error.strerror}): set SyncConfig.master_address to an "
            "address of this machine that the servers reach, and master_port to a free port (or None)"
        ) from error
    chosen = int(listener.getsockname()[1])
    store = dist.TCPStore(  # type: ignore[attr-defined]
        address, chosen, None, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    return store, chosen


def _ask_to_join(
    clients: Sequence[SGLangClient], *, name: str, address: str, port: int, world_size: int, backend: str
) -> dict[str, Task[Any]]:
    joins: dict[str, Task[Any]] = {}
    offset = 1
    for client in clients:
        request = build_init_group(
            address=address, port=port, rank_offset=offset, world_size=world_size, name=name, backend=backend
        )
        joins[client.url] = Task(_bind_send(client, request), name=f"join-{client.url}")
        offset += client.info.tp_size
    return joins


def _bind_send(client: SGLangClient, request: Any) -> Any:
    return lambda: client.send(request)


def _await_ranks(
    store: c10d.Store,
    joins: Mapping[str, Task[Any]],
    world_size: int,
    backend: str,
    deadline: float,
    *,
    address: str,
    port: int,
) -> None:
    """Wait until every rank stands at the store, so that joining can't block on one that never comes.

    Each gloo rank leaves one key there, and all together the store's own counter of clients: ``world_size`` keys. NCCL
    ranks leave none, they answer the HTTP call instead.
    """
    while True:
        arrived = store.num_keys() >= world_size if backend == "gloo" else all(task.done for task in joins.values())
        for url, task in joins.items():
            if task.done:
                _check_join(url, task, deadline, address=address, port=port)
        if arrived:
            return
        if time.monotonic() > deadline:
            silent = [url for url, task in joins.items() if not task.done]
            raise WeightUpdateError(
                f"the weight group did not form within its time: {', '.join(silent or joins)} did not arrive at "
                f"{address}:{port}. Can the servers reach that address? Set SyncConfig.master_address to one of the "
                "trainer's that they reach, or raise group_timeout_s",
                server_weights={url: "stuck" if url in silent else "old" for url in joins},
            )
        time.sleep(_POLL_S)


def _check_join(url: str, task: Task[Any], deadline: float, *, address: str, port: int) -> None:
    if not task.wait(max(0.0, deadline - time.monotonic())):
        raise WeightUpdateError(f"{url} did not answer while joining the weight group", server_weights={url: "stuck"})
    outcome: Outcome[Any] = task.outcome()
    try:
        check_success(outcome.unwrap(), server=url, what="joining the weight group")
    except SGLangError as error:
        raise WeightUpdateError(
            f"{url} could not join the weight group at {address}:{port}: {error}. No weights were touched",
            server_weights={url: "old"},
        ) from error


def _join(store: c10d.Store, world_size: int, backend: str, address: str, config: SyncConfig) -> Any:
    timeout = timedelta(seconds=config.group_timeout_s)
    try:
        if backend == "gloo":
            options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
            options._timeout = timeout
            return dist.ProcessGroupGloo(store, 0, world_size, options)
        nccl = dist.ProcessGroupNCCL.Options()
        # Above every deadline of ours: on its own time-out NCCL's watchdog ends the whole process.
        nccl._timeout = timedelta(seconds=10 * (config.fixed_timeout_s + config.group_timeout_s) + 3600)
        return dist.ProcessGroupNCCL(store, 0, world_size, nccl)
    except RuntimeError as error:
        raise WeightUpdateError(f"the trainer could not join the weight group: {error}") from error
