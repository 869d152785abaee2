"""Offloads the servers' GPU memory while the trainer needs it, for both on one GPU."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal, get_args

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.errors import ConfigError, RequestRejectedError, SGLangError
from torchrl_sglang.parallel import side_by_side
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.pool.dispatch import dead_server
from torchrl_sglang.protocol import control
from torchrl_sglang.protocol.messages import HttpRequest
from torchrl_sglang.protocol.version import WeightVersion

__all__ = ["ALL_TAGS", "EngineMemory", "MemoryTag"]

MemoryTag = Literal["kv_cache", "weights", "cuda_graph"]
"""What a server holds on its GPU."""

ALL_TAGS: tuple[MemoryTag, ...] = get_args(MemoryTag)

_log = logging.getLogger(__name__)

_POLL_S = 0.05


class EngineMemory:
    """Releases and resumes the GPU memory of an engine's servers.

    Args:
        pool: the servers.
    """

    def __init__(self, pool: SGLangPool) -> None:
        self._pool = pool

    @contextmanager
    def offloaded(self, tags: Sequence[MemoryTag] = ALL_TAGS) -> Iterator[None]:
        """The servers hold no GPU memory during this block: for a training step on the GPU that they run on.

        At its end torch's cached memory is freed in this process too: tensors that still exist stay. A server that
        crashes in the block is started again after it.

        Args:
            tags: what they release.

        Raises:
            The errors of :meth:`release` and :meth:`resume`.

        Examples:
            >>> with engine.offloaded():                                  # doctest: +SKIP
            ...     loss.backward(); optimizer.step()
            >>> sync.push(model)  # WeightSync(engine.pool, SyncConfig(transport="ipc"))             # doctest: +SKIP
        """
        self.release(tags)
        try:
            yield
        finally:
            _free_cached_memory()
            self.resume(tags)

    def release(self, tags: Sequence[MemoryTag] = ALL_TAGS) -> None:
        """Make all servers release GPU memory. They serve nothing until :meth:`resume`.

        Requests under way return to the servers' queues and continue afterwards. A server that is being started is
        waited for, and none is started until :meth:`resume`. One that is gone holds no memory.

        Args:
            tags: ``"kv_cache"``, ``"weights"``, ``"cuda_graph"``. Weights come back as they were only if the servers
                were launched with ``--enable-weights-cpu-backup``; otherwise the next weight update brings them.

        Raises:
            ConfigError: an unknown tag, memory that is released already, or a server that can't: one without a GPU, or
                launched without ``--enable-memory-saver``. Nothing was changed.
            RequestRejectedError: a server does not become idle; the others have resumed.
            ServerError: a server did not answer; the others have resumed.
        """
        wanted = _checked(tags)
        for client in self._pool.clients:
            _require_memory_saver(client)
            twice = self._pool.state.server(client.url).offloaded_tags & wanted
            if twice:
                raise ConfigError(f"{client.url} has released {sorted(twice)} already: resume_memory() first")
        with self._pool.update_lock.held_for("releasing GPU memory"):
            for client in self._pool.clients:
                self._pool.offload(client.url)
            try:
                self._await_restarts()
                self._on_all(self._release, wanted)
            except SGLangError:
                self._on_all(self._resume, wanted)
                raise

    def resume(self, tags: Sequence[MemoryTag] = ALL_TAGS) -> None:
        """Make all servers allocate again what they have released.

        With the last of it they continue to serve. After a release of weights without a backup on the CPU, they serve
        again after the next weight update. A server that is gone by then is taken out of routing: what restarts
        servers (``restart=``, or a supervisor) brings it back.

        Args:
            tags: as in :meth:`release`.

        Raises:
            ConfigError: an unknown tag.
            ServerError: a server did not do it: is the memory free again?
        """
        wanted = _checked(tags)
        with self._pool.update_lock.held_for("resuming GPU memory"):
            self._on_all(self._resume, wanted)

    def _on_all(self, call: Callable[[SGLangClient, set[str]], None], tags: set[str]) -> None:
        calls = {client.url: partial(call, client, tags) for client in self._pool.clients}
        for outcome in side_by_side(calls).values():
            outcome.unwrap()

    def _await_restarts(self) -> None:
        """Wait until no server is being started; a start has a time limit of its own."""
        state = self._pool.state
        while any(state.server(client.url).is_restarting for client in self._pool.clients):
            time.sleep(_POLL_S)

    def _release(self, client: SGLangClient, tags: set[str]) -> None:
        is_first = not self._pool.state.server(client.url).offloaded_tags
        try:
            if is_first:
                # Before 0.5.21 SGLang ends when its cache is flushed over retracted requests.
                _call(client, control.build_pause("retract" if client.dialect.weight_session else "abort"))
                # A busy server refuses the flush. It would not refuse the release: it would end.
                _call(client, control.build_flush())
            if "weights" in tags and not client.info.raw.get("enable_weights_cpu_backup"):
                lost = WeightVersion(number=self._pool.weight_version + 1, dirty=True)
                _call(client, control.build_set_version(str(lost)))
            _call(client, control.build_release_memory(sorted(tags)))
        except SGLangError as error:
            if dead_server(client, error) is None:
                raise
            _log.warning("%s is gone, and its GPU memory with it (%s)", client.url, error)
        self._pool.offload(client.url, tags)

    def _resume(self, client: SGLangClient, tags: set[str]) -> None:
        state = self._pool.state
        known = state.server(client.url)
        released = known.offloaded_tags & tags
        if known.before_offload is None or (known.offloaded_tags and not released):
            return  # SGLang (0.5.23) ends when it resumes what was not released
        try:
            if known.offloaded_tags and _is_new_process(client):
                state.memory_lost(client.url, "its process was replaced while its GPU memory was offloaded")
                state.restarted(client.url, client.weight_version())
                return
            if released:
                _call(client, control.build_resume_memory(sorted(released)))
            if not state.memory_resumed(client.url, released).offloaded_tags:
                self._serve(client)
        except SGLangError as error:
            if dead_server(client, error) is None:
                raise
            state.memory_lost(client.url, f"it died while its GPU memory was offloaded ({error})")

    def _serve(self, client: SGLangClient) -> None:
        """Let a server continue that has all its memory, unless its weights are gone."""
        before = self._pool.state.server(client.url).before_offload
        has_served = before is not None and before[0] in ("serving", "updating")
        now = self._pool.state.offload_ended(client.url)
        if client.held_version().dirty:
            if has_served:
                reason = "its weights were released; the next weight update brings new ones"
                self._pool.quarantine(client.url, reason)
            return
        _call(client, control.build_continue())
        if has_served:
            self._pool.restore(client.url, based_on=now)


def _is_new_process(client: SGLangClient) -> bool:
    """Whether a server that was paused for its release is not paused: somebody has started it again."""
    try:
        client.send(control.build_ready())
    except RequestRejectedError:
        return False
    return True


def _free_cached_memory() -> None:
    """Give back GPU memory that torch keeps for later in this process: the servers need it now."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _checked(tags: Sequence[MemoryTag]) -> set[str]:
    if isinstance(tags, str) or not set(tags) <= set(ALL_TAGS) or not tags:
        raise ConfigError(f"tags are some of {list(ALL_TAGS)}, got {tags!r}")
    return set(tags)


def _require_memory_saver(client: SGLangClient) -> None:
    """Require that a server can release memory. One that can't answers 200 and frees nothing.

    Raises:
        ConfigError: the server has no GPU, or was launched without the memory saver.
    """
    if client.info.device == "cpu":
        raise ConfigError(f"{client.url} runs on the CPU: it holds no GPU memory that it could release")
    if not client.info.raw.get("enable_memory_saver"):
        raise ConfigError(
            f"{client.url} was launched without --enable-memory-saver and can't release memory: launch it with "
            "extra_args=('--enable-memory-saver',), and with '--enable-weights-cpu-backup' too if the weights are to "
            "come back by themselves (the server's Python needs the package torch-memory-saver)"
        )


def _call(client: SGLangClient, request: HttpRequest) -> None:
    control.check_success(client.send(request), server=client.url, what=request.path)
