"""Sends buckets over process groups: announce over HTTP, broadcast, pack the next one meanwhile, read every reply."""

from __future__ import annotations

import queue
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SyncConfig
from torchrl_sglang.errors import RequestRejectedError, ServerWeights, SGLangError, WeightUpdateError
from torchrl_sglang.parallel import Task
from torchrl_sglang.pool import PoolState
from torchrl_sglang.protocol.control import build_update_bucket, check_success
from torchrl_sglang.protocol.messages import HttpRequest
from torchrl_sglang.weights.buckets.layout import Bucket
from torchrl_sglang.weights.group.process_group import WeightGroup

__all__ = ["BucketLoop"]


_NOTHING_LOADED = ("Failed to receive weights", "must run between begin_weight_update")
"""SGLang's messages for a refusal before it loads anything of a bucket; other refusals may come from the middle."""

_REPLY_TIMEOUT_S = 1.0
"""How long to wait for a server's own reply about a broken broadcast."""


class BucketLoop:
    """Sends packed buckets to all servers of some process groups.

    A bucket is announced to a server only after the server has received the one before it: two announcements under way
    could arrive in either order, and then a rank would receive what it was not told of. For some servers the end of the
    broadcast shows that (:attr:`WeightGroup.synchronous_urls`); for the others the loop waits for their reply. While a
    bucket is broadcast, the next one is packed and the servers load the one before.

    With a group per server, a server that fails drops out and the others go on.

    Args:
        groups: one group over all servers, or one per server.
        state: the pool's state: from its first announcement on a server holds mixed weights.
        config: time-outs.
        deadline: ``time.monotonic()`` value by which everything has to have arrived.
    """

    def __init__(self, groups: Sequence[WeightGroup], state: PoolState, config: SyncConfig, deadline: float) -> None:
        self._groups = list(groups)
        self._state = state
        self._config = config
        self._deadline = deadline
        self._failed: dict[str, SGLangError] = {}
        self._weights_before: dict[str, ServerWeights] = {}
        self._done: queue.SimpleQueue[Task[Any]] = queue.SimpleQueue()
        self._replies: dict[Task[Any], str] = {}
        self._postponed: defaultdict[str, deque[Callable[[], None]]] = defaultdict(deque)
        self._group_of: dict[Task[Any], WeightGroup] = {}
        self._first_arrived = False

    def run(
        self, packed: Iterator[tuple[Bucket, torch.Tensor]], *, num_buckets: int | None, flush_cache: bool
    ) -> Mapping[str, SGLangError]:
        """Send every bucket.

        Args:
            packed: pairs of a bucket and its bytes (uint8, ``(bucket.nbytes,)``). The loop reads a bucket's bytes until
                it asks for the bucket after the next.
            num_buckets: how many will come, if that is known.
            flush_cache: empty the prefix caches with the last bucket (needs ``num_buckets``).

        Returns:
            Servers that dropped out while others went on, and why.

        Raises:
            WeightUpdateError: a server refused, died or hung, and no group is left without such a server; names it.
        """
        sent = 0
        item = next(packed, None)
        while item is not None:
            bucket, flat = item
            sent += 1
            self._announce(bucket, flush_cache=flush_cache and sent == num_buckets)
            broadcasts = self._broadcast(flat)
            item = next(packed, None)
            self._await(broadcasts)
            self._first_arrived = True
        while self._replies:
            self._await(set(self._replies))
        return self._failed

    def _announce(self, bucket: Bucket, *, flush_cache: bool) -> None:
        """Announce a bucket to every server, to some only after their reply to the bucket before."""
        owes_reply = {*self._replies.values(), *(url for url, postponed in self._postponed.items() if postponed)}
        for group in self._groups:
            request = build_update_bucket(
                names=bucket.names,
                dtypes=[str(dtype).removeprefix("torch.") for dtype in bucket.dtypes],
                shapes=bucket.shapes,
                group=group.name,
                flush_cache=flush_cache,
            )
            for client in group.clients:
                announce = partial(self._announce_to, client, group, request)
                if client.url in owes_reply and client.url not in group.synchronous_urls:
                    self._postponed[client.url].append(announce)
                else:
                    announce()

    def _announce_to(self, client: SGLangClient, group: WeightGroup, request: HttpRequest) -> None:
        self._weights_before.setdefault(client.url, self._state.server(client.url).weights)
        self._state.weights_changed(client.url, "mixed")
        call = partial(_send_announcement, client, request, self._remaining())
        task = Task(call, name=client.url, on_done=self._done.put)
        self._replies[task] = client.url
        self._group_of[task] = group

    def _broadcast(self, flat: torch.Tensor) -> set[Task[Any]]:
        """Start the broadcast of a bucket's bytes in every group."""
        # All groups share the trainer's network.
        limit_s = self._config.bucket_limit_s(flat.nbytes * len(self._groups))
        if not self._first_arrived:
            limit_s = max(limit_s, self._config.group_limit_s(max(group.world_size for group in self._groups)))
        timeout_s = min(limit_s, self._remaining())
        started = set()
        for group in self._groups:
            call = partial(group.broadcast, flat, timeout_s=timeout_s)
            task: Task[Any] = Task(call, name=f"broadcast-{group.name}", on_done=self._done.put)
            self._group_of[task] = group
            started.add(task)
        return started

    def _await(self, tasks: set[Task[Any]]) -> None:
        """Wait until ``tasks`` have ended, and read every reply that comes in meanwhile."""
        waiting = set(tasks)
        while waiting:
            try:
                task = self._done.get(timeout=max(0.0, self._remaining()))
            except queue.Empty:
                raise self._timed_out() from None
            waiting.discard(task)
            group = self._group_of.pop(task, None)
            if group is None:  # of a group that has dropped out
                continue
            url = self._replies.pop(task, None)
            outcome = task.outcome()
            if outcome.error is not None:
                self._drop_out(group, self._failure(group, url, outcome.error))
                waiting &= self._group_of.keys()
            elif url is not None and (postponed := self._postponed[url]):
                postponed.popleft()()

    def _drop_out(self, group: WeightGroup, error: SGLangError) -> None:
        """Go on without a group that failed, unless it is the last."""
        self._groups.remove(group)
        if not self._groups:
            raise error
        for client in group.clients:
            self._failed[client.url] = error
            self._postponed.pop(client.url, None)
        for task in [task for task, its_group in self._group_of.items() if its_group is group]:
            del self._group_of[task]
            self._replies.pop(task, None)

    def _failure(self, group: WeightGroup, url: str | None, error: SGLangError) -> SGLangError:
        if url is None:
            # A broken broadcast says that some peer is gone, a server's own reply says which one and why: wait for it.
            end = time.monotonic() + _REPLY_TIMEOUT_S
            replies = {task: url for task, url in self._replies.items() if self._group_of[task] is group}
            for task, suspect in replies.items():
                if task.wait(max(0.0, end - time.monotonic())) and (reason := task.outcome().error) is not None:
                    return self._failure(group, suspect, reason)
            silent = sorted({suspect for task, suspect in replies.items() if not task.done})
            return WeightUpdateError(f"{error}; no reply from {', '.join(silent) or 'any server'}")
        refusal = error.detail if isinstance(error, RequestRejectedError) else ""
        if not self._first_arrived and any(words in refusal for words in _NOTHING_LOADED):
            self._state.weights_changed(url, self._weights_before[url])
        return WeightUpdateError(f"{url} failed while receiving weights: {error}")

    def _timed_out(self) -> SGLangError:
        silent = sorted({url for task, url in self._replies.items() if not task.done})
        return WeightUpdateError(
            f"the weights did not arrive in time; no reply from {', '.join(silent) or 'the process group'}. A frozen "
            "server, or a slower network than SyncConfig.assumed_bytes_per_s assumes?"
        )

    def _remaining(self) -> float:
        return max(0.05, self._deadline - time.monotonic())


def _send_announcement(client: SGLangClient, request: HttpRequest, timeout_s: float) -> None:
    check_success(client.send(request, timeout_s=timeout_s), server=client.url, what="a bucket of weights")
