"""The trainer's side of the weight group: rank 0 of a process group whose other ranks are inside the servers.

Server ``i`` holds ranks ``offset_i .. offset_i + tp_size_i - 1``. The group is made from torch's public classes, with
the store prefixes that SGLang's own helper uses, and never touches the trainer's default process group.

Only this module knows how NCCL differs from gloo (read in SGLang's source, not yet run on GPUs):

* gloo connects when the group is made, so a 200 from every server shows that all ranks are connected; NCCL connects at
  the first broadcast, so the first bucket has the group's own deadline;
* NCCL's communicator belongs to the GPU of the first tensor, so all tensors must be on that GPU: the trainer's;
* a gloo broadcast that has returned has been sent; an NCCL broadcast is only enqueued, and its work handle tells when
  the buffer is free again, or that the broadcast has failed;
* gloo can't abort an operation under way, which ends at the operation's own time-out; NCCL aborts at once, but its
  watchdog kills the trainer's process first if the group's time-out is shorter than ours.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SyncConfig
from torchrl_sglang.errors import ConfigError, SGLangError, WeightUpdateError
from torchrl_sglang.forks import renew_in_forked_children
from torchrl_sglang.parallel import Task, side_by_side
from torchrl_sglang.protocol.control import build_destroy_group
from torchrl_sglang.weights.group.rendezvous import Rendezvous, ask_to_join, await_ranks, check_join, reachable_address

__all__ = ["WeightGroup", "choose_backend", "close_groups", "reachable_address"]

_POLL_S = 0.005
_CLOSE_PATIENCE_S = 2.0


class WeightGroup:
    """A process group of the trainer (rank 0) and every rank of the given servers. Use :meth:`form`.

    Attributes:
        name: the group's name on the servers.
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
        renew_in_forked_children(self)

    def renew_after_fork(self) -> None:
        """Leave the group to the parent; called in a forked child.

        Destroying its copy would wait for threads that the child does not have, also at the child's exit. So it gets a
        reference that nobody gives back.
        """
        if self._group is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._group))
            self._group = None
            self.clients = ()

    @classmethod
    def form(cls, clients: Sequence[SGLangClient], config: SyncConfig, name: str) -> WeightGroup:
        """Make the group: every server is told to join, and the trainer joins with them.

        Args:
            clients: the servers; each contributes ``tp_size`` ranks.
            config: address, port, backend and time-outs.
            name: the group's name on the servers; none of them may have a group of that name.

        Raises:
            ConfigError: the address can't be listened on, or the servers could not reach it.
            WeightUpdateError: a server refused, died or did not join in time; no server's weights were touched.
        """
        backend = choose_backend(config, clients)
        address = config.master_address or reachable_address([client.url for client in clients])
        world_size = 1 + sum(client.info.tp_size for client in clients)
        timeout_s = config.group_limit_s(world_size)
        rendezvous = Rendezvous(name, address, config.master_port, timeout_s=timeout_s)
        deadline = time.monotonic() + timeout_s
        joins = ask_to_join(clients, rendezvous, world_size, backend, config)
        try:
            await_ranks(rendezvous, joins, backend, deadline)
            group = cls(name, clients, backend, world_size, _join(rendezvous, world_size, backend, timeout_s))
        except BaseException:
            rendezvous.abandon(joins, backend, deadline)
            raise
        rendezvous.end()  # the group holds the store now
        try:
            for join in joins:
                check_join(join, deadline, rendezvous)
        except BaseException:
            group.drop()
            raise
        return group

    @property
    def synchronous_urls(self) -> frozenset[str]:
        """Servers that have received a broadcast for certain when it has ended at the trainer.

        gloo's broadcast is a binomial tree: the trainer sends to ranks 1, 2, 4, ... and waits until they have received;
        the other ranks get the data from them later. NCCL waits for no rank.
        """
        if self.backend == "nccl":
            return frozenset()
        urls = set()
        first = 1
        for client in self.clients:
            ranks = range(first, first + client.info.tp_size)
            if any(rank & (rank - 1) == 0 for rank in ranks):
                urls.add(client.url)
            first = ranks.stop
        return frozenset(urls)

    @property
    def device(self) -> torch.device:
        """Where tensors must be to be broadcast: on one GPU for NCCL, on the CPU for gloo."""
        return torch.device("cuda" if self.backend == "nccl" else "cpu")

    def broadcast(self, tensor: torch.Tensor, *, timeout_s: float) -> None:
        """Send a tensor from rank 0 to all others and wait until its memory may be written again.

        Args:
            tensor: contiguous, on :attr:`device`, with all work on it finished: the broadcast uses a stream of its own.
            timeout_s: seconds after which the operation fails.

        Raises:
            WeightUpdateError: a peer is gone or did not take part in time.
        """
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        options.timeout = timedelta(seconds=timeout_s)
        work: Any = None
        try:
            work = self._group.broadcast([tensor], options)
            if self.backend == "nccl":
                self._await_enqueued(work, timeout_s)
            else:
                work.wait()
        except RuntimeError as error:
            advice = ""
            if "uplicate GPU" in str(error):
                advice = (
                    ". Trainer and server share a GPU, which NCCL refuses: give the servers others "
                    "(from_pretrained(..., gpus=[[1], ...])), or use SyncConfig(transport='disk')"
                )
            message = f"the {self.backend} broadcast of {tensor.nbytes} bytes failed: {error}{advice}"
            raise WeightUpdateError(message) from error
        finally:
            # The work handle keeps the group's connections open, and a traceback keeps this frame: peers would wait.
            work = None

    def _await_enqueued(self, work: Any, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not work.is_completed():
            if time.monotonic() > deadline:
                self._group.abort()
                raise WeightUpdateError(f"the NCCL broadcast did not finish within {timeout_s:g} s and was aborted")
            time.sleep(_POLL_S / 10)
        error = work.exception()  # a work that has failed is completed too
        if error is not None:
            raise WeightUpdateError(f"the NCCL broadcast failed: {error}")

    def close(self) -> None:
        """Destroy the group on both sides. A server that does not answer keeps it until its own time-out."""
        close_groups([self])

    def leave(self, client: SGLangClient, timeout_s: float = _CLOSE_PATIENCE_S) -> None:
        """Make one server leave the group. Its connections close, which ends every wait of a peer for it.

        Raises:
            ServerError: it did not answer in time, or is not in the group.
        """
        client.send(build_destroy_group(self.name), timeout_s=timeout_s)

    def release(self) -> None:
        """Destroy the trainer's side in this thread: quick, if nothing is under way. Safe to call twice."""
        if self._group is not None:
            release = _Release(self._group, self.backend)
            self._group = None
            release()  # in this thread: at exit another one could be stopped in the middle of it

    def drop(self) -> None:
        """Destroy the trainer's side only, without blocking. Safe to call twice.

        gloo waits for an operation under way when it is destroyed, so a thread deletes the last reference.
        """
        if self._group is not None:
            release = _Release(self._group, self.backend)
            self._group = None  # no name in this thread may refer to it: deleting the last reference waits
            if sys.is_finalizing():
                return  # the group ends with the process, and a thread started now would never run
            with suppress(RuntimeError):  # Python 3.12 refuses to start a thread at exit
                Task(release, name="drop-weight-group")


def close_groups(groups: Sequence[WeightGroup]) -> None:
    """Destroy groups on both sides: all servers are told at the same time, or one by one where no thread starts.

    It is also called at exit, when Python (3.12) refuses to start threads.
    """
    deadline = time.monotonic() + _CLOSE_PATIENCE_S

    def leave(group: WeightGroup, client: SGLangClient) -> None:
        with suppress(SGLangError):
            group.leave(client, timeout_s=max(0.1, deadline - time.monotonic()))

    calls = {
        f"{index}-{client.url}": partial(leave, group, client)
        for index, group in enumerate(groups)
        for client in group.clients
    }
    try:
        if calls and not sys.is_finalizing():
            side_by_side(calls)
            calls = {}
    except RuntimeError:
        pass
    for call in calls.values():
        call()
    for group in groups:
        group.release()


class _Release:
    """Holds the last reference to a group, and deletes it when called."""

    def __init__(self, group: Any, backend: str) -> None:
        self._group = group
        self._backend = backend

    def __call__(self) -> None:
        if self._backend == "nccl":
            self._group.abort()
        self._group = None


def choose_backend(config: SyncConfig, clients: Sequence[SGLangClient]) -> str:
    """``"gloo"`` or ``"nccl"``: what the servers' devices need, unless ``config`` names it.

    Raises:
        ConfigError: the servers run on different devices.
    """
    if config.backend != "auto":
        return config.backend
    devices = {client.info.device for client in clients}
    if devices == {"cpu"}:
        return "gloo"
    if "cpu" in devices:
        raise ConfigError(f"the servers run on different devices ({sorted(devices)}): one group can't hold them")
    return "nccl"


def _join(rendezvous: Rendezvous, world_size: int, backend: str, timeout_s: float) -> Any:
    store: Any = rendezvous.prefixed(backend)
    try:
        if backend == "gloo":
            options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=rendezvous.address)]
            options._timeout = timedelta(seconds=timeout_s)
            return dist.ProcessGroupGloo(store, 0, world_size, options)
        nccl = dist.ProcessGroupNCCL.Options()
        # Above every deadline of ours: on its own time-out NCCL's watchdog ends the whole process.
        nccl._timeout = timedelta(seconds=10 * timeout_s + 36_000)
        return dist.ProcessGroupNCCL(store, 0, world_size, nccl)
    except RuntimeError as error:
        advice = (
            f". {rendezvous.address} and a server's own address are of different families, IPv4 and IPv6: set "
            "SyncConfig(master_address=...) to this machine's address of the servers' family, or use transport='http'"
            if "ss_family" in str(error)
            else ""
        )
        raise WeightUpdateError(f"the trainer could not join the weight group: {error}{advice}") from error
    finally:
        store = None  # a traceback keeps this frame, and the frame would keep the store: see Rendezvous
