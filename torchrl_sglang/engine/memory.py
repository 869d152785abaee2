"""GPU memory lent to the trainer: servers give it back while they are not needed, for both on one GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal, get_args

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.errors import ConfigError, SGLangError
from torchrl_sglang.parallel import side_by_side
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol import control
from torchrl_sglang.protocol.messages import HttpRequest
from torchrl_sglang.protocol.version import WeightVersion

__all__ = ["MemoryMethods", "MemoryTag"]

MemoryTag = Literal["kv_cache", "weights", "cuda_graph"]
"""What a server holds on its GPU."""

_ALL: tuple[MemoryTag, ...] = get_args(MemoryTag)


class MemoryMethods:
    """The part of :class:`AsyncSGLang` that lends GPU memory to the trainer."""

    pool: SGLangPool

    @contextmanager
    def offloaded(self, tags: Sequence[MemoryTag] = _ALL) -> Iterator[None]:
        """The servers hold no GPU memory during this block: for a training step on the GPU they run on.

        Args:
            tags: what they give back.

        Raises:
            The errors of :meth:`release_memory` and :meth:`resume_memory`.

        Examples:
            >>> with engine.offloaded():                                  # doctest: +SKIP
            ...     loss.backward(); optimizer.step()
            >>> sync.push(model)  # WeightSync(engine.pool, SyncConfig(transport="disk", ...))       # doctest: +SKIP
        """
        self.release_memory(tags)
        try:
            yield
        finally:
            self.resume_memory(tags)

    def release_memory(self, tags: Sequence[MemoryTag] = _ALL) -> None:
        """Have all servers give GPU memory back. They serve nothing until :meth:`resume_memory`.

        Requests under way are put back into the servers' queues and go on afterwards.

        Args:
            tags: ``"kv_cache"``, ``"weights"``, ``"cuda_graph"``. Weights come back as they were only when the servers
                were launched with ``--enable-weights-cpu-backup``; otherwise the next weight update brings them.

        Raises:
            ConfigError: an unknown tag, memory that is released already, or a server that can't: one without a GPU, or
                launched without ``--enable-memory-saver``. Nothing was changed.
            RequestRejectedError: a server does not get idle; the others have resumed.
            ServerError: a server did not answer; the others have resumed.
        """
        wanted = _checked(tags)
        for client in self.pool.clients:
            _refuse_what_it_cannot_do(client)
            twice = self.pool.offloaded_tags.get(client.url, set()) & wanted
            if twice:
                raise ConfigError(f"{client.url} has released {sorted(twice)} already: resume_memory() first")
        with self.pool.update_lock:
            try:
                self._on_all(self._release, wanted)
            except SGLangError:
                self._on_all(self._resume, wanted)
                raise

    def resume_memory(self, tags: Sequence[MemoryTag] = _ALL) -> None:
        """Have all servers take their GPU memory again, as far as they have released it.

        With the last of it they go on serving; after a release of weights without a backup on the CPU, only the next
        weight update puts them to use.

        Args:
            tags: as in :meth:`release_memory`.

        Raises:
            ConfigError: an unknown tag.
            ServerError: a server did not do it: is the memory free again?
        """
        wanted = _checked(tags)
        with self.pool.update_lock:
            self._on_all(self._resume, wanted)

    def _on_all(self, do: Callable[[SGLangClient, set[str]], None], tags: set[str]) -> None:
        for outcome in side_by_side({client.url: partial(do, client, tags) for client in self.pool.clients}).values():
            outcome.unwrap()

    def _release(self, client: SGLangClient, tags: set[str]) -> None:
        url, first = client.url, client.url not in self.pool.offloaded_tags
        try:
            if first:
                self.pool.quarantine(url, "its memory is lent out: resume_memory() takes it back")
                # Before 0.5.21 SGLang can't flush over retracted requests: it ends.
                _ask(client, control.build_pause("retract" if client.dialect.weight_session else "abort"))
                # Only an idle server flushes. One that is not would not refuse the release: it would die of it.
                _ask(client, control.build_flush())
            if "weights" in tags and not client.info.raw.get("enable_weights_cpu_backup"):
                lost = WeightVersion(number=self.pool.weight_version + 1, dirty=True)
                _ask(client, control.build_set_version(str(lost)))
            _ask(client, control.build_release_memory(sorted(tags)))
        except SGLangError:
            if first:
                self._serve(client)
            raise
        self.pool.offloaded_tags.setdefault(url, set()).update(tags)

    def _resume(self, client: SGLangClient, tags: set[str]) -> None:
        lent = self.pool.offloaded_tags.get(client.url, set())
        back = lent & tags
        if not back:  # SGLang (0.5.23) dies of resuming what was not released
            return
        _ask(client, control.build_resume_memory(sorted(back)))
        lent -= back
        if not lent:
            del self.pool.offloaded_tags[client.url]
            self._serve(client)

    def _serve(self, client: SGLangClient) -> None:
        """Back to work, unless the weights are gone."""
        if client.held_version().dirty:
            self.pool.quarantine(client.url, "its weights were released; the next weight update brings new ones")
            return
        _ask(client, control.build_continue())
        self.pool.restore(client.url)


def _checked(tags: Sequence[MemoryTag]) -> set[str]:
    if isinstance(tags, str) or not set(tags) <= set(_ALL) or not tags:
        raise ConfigError(f"tags are some of {list(_ALL)}, got {tags!r}")
    return set(tags)


def _refuse_what_it_cannot_do(client: SGLangClient) -> None:
    """SGLang itself answers 200 and frees nothing.

    Raises:
        ConfigError: the server has no GPU, or was not prepared for it at launch.
    """
    if client.info.device == "cpu":
        raise ConfigError(f"{client.url} runs on the CPU: it holds no GPU memory that it could release")
    if not client.info.raw.get("enable_memory_saver"):
        raise ConfigError(
            f"{client.url} was launched without --enable-memory-saver and can't release memory: launch it with "
            "extra_args=('--enable-memory-saver',), and with '--enable-weights-cpu-backup' too if the weights are to "
            "come back by themselves (the server's Python needs the package torch-memory-saver)"
        )


def _ask(client: SGLangClient, request: HttpRequest) -> None:
    control.check_success(client.send(request), server=client.url, what=request.path)
