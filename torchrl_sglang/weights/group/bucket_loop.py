"""The bucket loop: announce over HTTP, broadcast, pack the next one meanwhile, watch every reply."""

from __future__ import annotations

import queue
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SyncConfig
from torchrl_sglang.errors import RequestRejectedError, SGLangError, WeightUpdateError
from torchrl_sglang.parallel import Task
from torchrl_sglang.protocol.control import build_update_bucket, check_success
from torchrl_sglang.protocol.messages import HttpRequest
from torchrl_sglang.weights.buckets.layout import Bucket
from torchrl_sglang.weights.group.process_group import WeightGroup

__all__ = ["Transfer"]


_NOTHING_LOADED = ("Failed to receive weights", "must run between begin_weight_update")
"""SGLang's words for a refusal before anything of the bucket was loaded; any other may come from the middle of it."""

_REPLY_PATIENCE_S = 1.0
"""How long a server's own account of a broken broadcast is waited for."""


class Transfer:
    """Sends packed buckets to all servers of some groups.

    A bucket is announced to a server only after the server has taken up the one before it: two announcements under way
    could arrive in either order, and then a rank would receive what it was not told of. For some servers the broadcast
    itself shows that (:attr:`WeightGroup.in_step`), the reply of the others is waited for. While a bucket is broadcast
    the next is packed, and the servers load the one before.

    With a group per server, a server that fails drops out (:attr:`failed`) and the others go on.

    Args:
        groups: one group over all servers, or one per server.
        config: packing, cache handling and time-outs.
        deadline: ``time.monotonic()`` value by which everything has to have arrived.

    Attributes:
        announced: servers that were told of at least one bucket.
        untouched: announced servers known to have refused before they received anything.
        failed: servers that dropped out, and why.
        num_bytes: bytes broadcast so far, counted once.
        num_buckets: buckets broadcast so far.
        num_tensors: tensors in them.
        flushed: the last bucket told the servers to empty their prefix caches.
    """

    def __init__(self, groups: Sequence[WeightGroup], config: SyncConfig, deadline: float) -> None:
        self.announced: set[str] = set()
        self.untouched: set[str] = set()
        self.failed: dict[str, SGLangError] = {}
        self.num_bytes = 0
        self.num_buckets = 0
        self.num_tensors = 0
        self.flushed = False
        self._groups = list(groups)
        self._all_groups = tuple(groups)
        self._config = config
        self._deadline = deadline
        self._done: queue.SimpleQueue[Task[Any]] = queue.SimpleQueue()
        self._replies: dict[Task[Any], str] = {}
        self._held_back: defaultdict[str, deque[Callable[[], None]]] = defaultdict(deque)
        self._group_of: dict[Task[Any], WeightGroup] = {}
        self._first_arrived = False

    def run(self, packed: Iterable[tuple[Bucket, torch.Tensor]], *, num_buckets: int | None, flush_cache: bool) -> None:
        """Send every bucket.

        Args:
            packed: pairs of a bucket and its bytes (uint8, ``(bucket.nbytes,)``). A bucket's memory is free again
                when the iterator is asked for the bucket after the next.
            num_buckets: how many will come, if that is known.
            flush_cache: empty the prefix caches with the last bucket, if it is known which one that is.

        Raises:
            WeightUpdateError: a server refused, died or hung, and no group is left without such a server; names it.
        """
        buckets = iter(packed)
        item = next(buckets, None)
        while item is not None:
            bucket, flat = item
            is_last = num_buckets is not None and self.num_buckets == num_buckets - 1
            self.flushed = is_last and flush_cache
            self._announce(bucket)
            flights = self._launch(bucket, flat)
            item = next(buckets, None)
            self._await(flights)
            self._first_arrived = True
            self.num_bytes += flat.nbytes
            self.num_buckets += 1
            self.num_tensors += len(bucket.slots)
        while self._replies:
            self._await(set(self._replies))

    def let_go(self) -> None:
        """After a failure: close the trainer's connections, so that servers that wait for its bytes are freed."""
        for group in self._all_groups:
            group.drop()

    def leave(self, client: SGLangClient, timeout_s: float) -> None:
        """Let a server leave its group after a failure; peers that wait for it in a collective are freed.

        Raises:
            ServerError: it did not answer in time, or did not know the group.
        """
        for group in self._all_groups:
            if client in group.clients:
                group.leave(client, timeout_s)

    def _announce(self, bucket: Bucket) -> None:
        """Tell every server at once, or as soon as it has answered for the bucket before."""
        waited_for = {*self._replies.values(), *(url for url, held_back in self._held_back.items() if held_back)}
        for group in self._groups:
            request = build_update_bucket(
                names=bucket.names,
                dtypes=[str(dtype).removeprefix("torch.") for dtype in bucket.dtypes],
                shapes=bucket.shapes,
                group=group.name,
                flattened=self._config.packing == "flattened",
                flush_cache=self.flushed,
            )
            for client in group.clients:
                tell = partial(self._tell, group, client, request)
                if client.url in waited_for and client.url not in group.in_step:
                    self._held_back[client.url].append(tell)
                else:
                    tell()

    def _tell_next(self, url: str) -> None:
        """A server has answered: tell it of the bucket after, if that one was held back."""
        if held_back := self._held_back[url]:
            held_back.popleft()()

    def _tell(self, group: WeightGroup, client: SGLangClient, request: HttpRequest) -> None:
        self.announced.add(client.url)
        task = Task(_announcing(client, request, self._remaining()), name=client.url, on_done=self._done.put)
        self._replies[task] = client.url
        self._group_of[task] = group

    def _launch(self, bucket: Bucket, flat: torch.Tensor) -> set[Task[Any]]:
        limit = self._config.bucket_timeout_s if self._first_arrived else self._config.group_timeout_s
        timeout_s = min(limit, self._remaining())
        parts = [flat] if self._config.packing == "flattened" else bucket.views(flat)

        def sending(group: WeightGroup) -> Any:
            def send() -> None:
                for part in parts:
                    group.broadcast(part, timeout_s=timeout_s)

            return send

        flights = set()
        for group in self._groups:
            task = Task(sending(group), name=f"broadcast-{group.name}", on_done=self._done.put)
            self._group_of[task] = group
            flights.add(task)
        return flights

    def _await(self, tasks: set[Task[Any]]) -> None:
        """Wait until ``tasks`` have ended, reading every reply that comes in meanwhile."""
        waiting = set(tasks)
        while waiting:
            try:
                task = self._done.get(timeout=max(0.0, self._remaining()))
            except queue.Empty:
                raise self._late() from None
            waiting.discard(task)
            group = self._group_of.pop(task, None)
            if group is None:  # of a group that has dropped out
                continue
            url = self._replies.pop(task, None)
            outcome = task.outcome()
            if outcome.error is not None:
                self._drop_out(group, self._failure(group, url, outcome.error))
                waiting &= self._group_of.keys()
            elif url is not None:
                self._tell_next(url)

    def _drop_out(self, group: WeightGroup, error: SGLangError) -> None:
        """Go on without a group that failed, unless it is the last."""
        self._groups.remove(group)
        if not self._groups:
            raise error
        for client in group.clients:
            self.failed[client.url] = error
            self._held_back.pop(client.url, None)
        for task in [task for task, its_group in self._group_of.items() if its_group is group]:
            del self._group_of[task]
            self._replies.pop(task, None)

    def _failure(self, group: WeightGroup, url: str | None, error: SGLangError) -> SGLangError:
        if url is None:
            # A broken broadcast says that some peer is gone, a server's own reply says which and why: wait for it.
            patience = time.monotonic() + _REPLY_PATIENCE_S
            replies = {task: url for task, url in self._replies.items() if self._group_of[task] is group}
            for task, suspect in replies.items():
                if task.wait(max(0.0, patience - time.monotonic())) and (reason := task.outcome().error) is not None:
                    return self._failure(group, suspect, reason)
            silent = sorted({suspect for task, suspect in replies.items() if not task.done})
            return WeightUpdateError(f"{error}; no reply from {', '.join(silent) or 'any server'}")
        refused = error.detail if isinstance(error, RequestRejectedError) else ""
        if not self._first_arrived and any(words in refused for words in _NOTHING_LOADED):
            self.untouched.add(url)
        return WeightUpdateError(f"{url} failed while receiving weights: {error}")

    def _late(self) -> SGLangError:
        silent = sorted({url for task, url in self._replies.items() if not task.done})
        return WeightUpdateError(
            f"the weights did not arrive in time; no reply from {', '.join(silent) or 'the process group'}. A frozen "
            "server, or a slower network than SyncConfig.assumed_bytes_per_s assumes?"
        )

    def _remaining(self) -> float:
        return max(0.05, self._deadline - time.monotonic())


def _announcing(client: SGLangClient, request: HttpRequest, timeout_s: float) -> Any:
    def call() -> None:
        check_success(client.send(request, timeout_s=timeout_s), server=client.url, what="a bucket of weights")

    return call
