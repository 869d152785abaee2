"""One weight update as the servers live it: pause, mark dirty, begin, (transfer), end, flush, new version, continue.

::

    with UpdateSession(pool, clients, version=..., config=...) as session:
        session.transfer(transfer, packed_buckets)

Leaving the block without an error finishes the update on every server. Leaving it with one takes the failure exit: a
server that received nothing goes on with its old weights; one that may have received something stays paused, marked
dirty and out of routing until a full sync succeeds; one that does not answer is reported as stuck.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import Any, Literal, NoReturn

import torch

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SyncConfig
from torchrl_sglang.errors import (
    ConfigError,
    RequestRejectedError,
    ServerWeights,
    SGLangError,
    WeightCoverageError,
    WeightUpdateError,
)
from torchrl_sglang.parallel import side_by_side
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol import control
from torchrl_sglang.protocol.dialect import MODEL_INFO
from torchrl_sglang.protocol.messages import HttpRequest
from torchrl_sglang.protocol.version import WeightVersion
from torchrl_sglang.weights.buckets.layout import Bucket
from torchrl_sglang.weights.group.bucket_loop import Transfer

__all__ = ["UpdateSession"]

_CLEANUP_TIMEOUT_S = 5.0
"""For control calls on the failure exit: a server that needs longer is waiting inside a collective."""


_STATE_IN_WORDS: dict[ServerWeights, str] = {
    "old": "serves its old weights",
    "new": "serves the new weights",
    "mixed": "holds mixed weights and serves nothing until all weights are sent again",
    "stuck": "does not answer and has to be restarted",
}


class UpdateSession:
    """A ``with`` block around one update; used once.

    Args:
        pool: the servers; its quarantine list is kept up to date.
        clients: the servers this update goes to.
        version: what the weights will be called.
        config: pause mode and cache handling.
        deadline: ``time.monotonic()`` value by which everything has to be done.

    Without a transfer (:meth:`load_from_disk`) no update session is opened on the servers: they open their own.

    Raises:
        ConfigError: these servers can't do what ``config`` asks for.

    Attributes:
        server_weights: per server URL what it holds at this moment.
        seconds: seconds per phase so far.
        pause_mode: the pause mode that was used.
        generation_paused_s: seconds between the pause and the continue.
        num_bytes: bytes broadcast, counted once.
        num_buckets: number of buckets they travelled in.
        num_tensors: number of tensors.
    """

    def __init__(
        self,
        pool: SGLangPool,
        clients: Sequence[SGLangClient],
        *,
        version: WeightVersion,
        config: SyncConfig,
        deadline: float,
        mark: str | None = None,
    ) -> None:
        self.server_weights: dict[str, ServerWeights] = {client.url: "old" for client in clients}
        self.seconds: dict[str, float] = {}
        self.pause_mode: Literal["abort", "retract", "in_place"] = "abort"
        self.generation_paused_s = 0.0
        self.num_bytes = 0
        self.num_buckets = 0
        self.num_tensors = 0
        self._pool = pool
        self._clients = tuple(clients)
        self._version = version
        self._dirty = str(WeightVersion(number=version.number, owner=mark or version.owner, dirty=True))
        self._config = config
        self._deadline = deadline
        self._previous: dict[str, str] = {}
        self._begun: set[str] = set()
        self._paused_at = 0.0
        self._flushed = False
        self._transfer: Transfer | None = None
        self._legacy = not all(client.dialect.weight_session for client in clients)
        if self._legacy and config.pause == "retract" and config.cache == "flush":
            raise ConfigError(
                "SGLang before 0.5.21 can't flush its prefix cache while retracted requests are queued (it ends): "
                "use SyncConfig(pause='abort')"
            )

    def __enter__(self) -> UpdateSession:
        try:
            self._open()
        except BaseException as error:  # noqa: BLE001  also on Ctrl-C servers are left in a good state; raised below
            self._fail(error)
            self._raise(error)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                raise error
            self._finish()
        except BaseException as failure:  # noqa: BLE001  as above
            self._fail(failure)
            self._raise(failure)

    def transfer(
        self, transfer: Transfer, packed: Iterable[tuple[Bucket, torch.Tensor]], *, num_buckets: int | None
    ) -> None:
        """Send the buckets; from the first announcement on a server counts as mixed.

        Args:
            transfer: over the groups to use.
            packed: see :meth:`Transfer.run`.
            num_buckets: how many will come, if that is known.

        Raises:
            WeightUpdateError: a server refused, died or hung.
        """
        with self._phase("begin"):
            self._run({client.url: self._beginning(client) for client in self._clients})
        self._transfer = transfer
        with self._phase("transfer"):
            try:
                transfer.run(packed, num_buckets=num_buckets, flush_cache=self._cache == "flush")
                self._flushed = transfer.flushed
                self.num_bytes, self.num_buckets = transfer.num_bytes, transfer.num_buckets
                self.num_tensors = transfer.num_tensors
            finally:
                for url in transfer.announced - transfer.untouched:
                    self.server_weights[url] = "mixed"

    def load_from_disk(self, path: str) -> None:
        """Have every server load a checkpoint folder.

        Raises:
            WeightUpdateError: a server can't read it.
        """
        flush = self._cache == "flush"
        with self._phase("transfer"):
            for client in self._clients:
                self.server_weights[client.url] = "mixed"
            self._each(
                "loading a checkpoint", control.build_update_from_disk(path, version=self._dirty, flush_cache=flush)
            )
            self._flushed = flush

    # ------------------------------------------------------------------ opening

    def _open(self) -> None:
        with self._phase("pause"):
            self.pause_mode = self._choose_pause()
            self._paused_at = time.monotonic()
            self._each("pausing", control.build_pause(self.pause_mode))
        with self._phase("begin"):
            self._remember_versions()
            self._each("marking its weights dirty", control.build_set_version(self._dirty))

    def _choose_pause(self) -> Literal["abort", "retract", "in_place"]:
        if self._config.pause != "auto":
            return self._config.pause
        for client in self._clients:
            if not self._legacy and control.parse_loads(client.send(control.build_loads())) > 0:
                return "retract"
        return "abort"  # at once when nothing runs, and unlike the other modes it lets an idle scheduler sleep

    @property
    def _cache(self) -> str:
        """Requests frozen in place keep their KV, and a flush is refused because of them: new requests get a salt."""
        if self._config.cache == "flush" and self.pause_mode == "in_place":
            return "salt"
        return self._config.cache

    def _remember_versions(self) -> None:
        answers = self._run(
            {client.url: partial(self._call, client, MODEL_INFO, "saying what it holds") for client in self._clients}
        )
        for url, answer in answers.items():
            version = WeightVersion.parse(str(answer["weight_version"]))
            if version.dirty:  # an earlier update never finished: there is no old state to go back to
                self.server_weights[url] = "mixed"
            self._previous[url] = str(answer["weight_version"])

    def _beginning(self, client: SGLangClient) -> Callable[[], None]:
        """Open the update session; a left-over one of a trainer that died is closed first."""

        def begin() -> None:
            if not client.dialect.weight_session:
                return
            request = control.build_begin_update()
            try:
                self._call(client, request, "opening the update session")
            except RequestRejectedError as error:
                if "already open" not in error.detail:
                    raise
                self.server_weights[client.url] = "mixed"  # nobody knows what the dead trainer had sent
                self._call(client, control.build_end_update(), "closing a left-over update session")
                self._call(client, request, "opening the update session")
            self._begun.add(client.url)

        return begin

    # ------------------------------------------------------------------ finishing

    def _finish(self) -> None:
        """Each server by itself: that one fails in the last step is no reason for another to serve nothing."""
        lost = self._transfer.failed if self._transfer is not None else {}
        self._pool.cache_salt = str(self._version) if self._cache == "salt" else None
        with self._phase("end"):
            self._run({client.url: self._ending(client) for client in self._clients if client.url not in lost})
        self.generation_paused_s = time.monotonic() - self._paused_at
        for error in lost.values():
            raise error

    def _ending(self, client: SGLangClient) -> Callable[[], None]:
        def end() -> None:
            if client.url in self._begun:
                self._call(client, control.build_end_update(), "closing the update session")
                self._begun.discard(client.url)
            if self._cache == "flush" and not self._flushed:
                # Costs a garbage collection on the server that flushing with the last bucket doesn't.
                self._call(client, control.build_flush(), "flushing its prefix cache")
            self._pool.highest_version = max(self._pool.highest_version, self._version.number)
            self._call(client, control.build_set_version(str(self._version)), "taking the new version")
            self._call(client, control.build_continue(), "continuing")
            self.server_weights[client.url] = "new"

        return end

    def withdraw(self, client: SGLangClient) -> None:
        """Stop a finished server and mark it dirty again: its proof failed."""
        self.server_weights[client.url] = "mixed"
        patience_s = min(_CLEANUP_TIMEOUT_S, client.config.control_timeout_s)
        try:
            client.send(control.build_pause("abort"), timeout_s=patience_s)
            client.send(control.build_set_version(self._dirty), timeout_s=patience_s)
        except SGLangError:
            self.server_weights[client.url] = "stuck"

    # ------------------------------------------------------------------ the failure exit

    def _fail(self, error: BaseException) -> None:
        """Bring every server into the best state it can still reach, and note that state."""
        if self._transfer is not None:
            self._transfer.let_go()
        self._take_out("mixed", error=error)  # before requests that they answer now as aborted look for a server again
        side_by_side({client.url: self._leaving(client) for client in self._clients})
        self._take_out("mixed", "stuck", error=error)

    def _take_out(self, *states: str, error: BaseException) -> None:
        for url, state in self.server_weights.items():
            if state in states:
                self._pool.quarantine(url, f"its weights are {state} after a failed update ({error})")

    def _raise(self, error: BaseException) -> NoReturn:
        """Raise an error of ours with what each server holds now and what to do; any other as it is."""
        if isinstance(error, WeightCoverageError):
            error.server_weights.update(self.server_weights)
        if isinstance(error, WeightCoverageError) or not isinstance(error, SGLangError):
            raise error
        states = "; ".join(f"{url} {_STATE_IN_WORDS[state]}" for url, state in self.server_weights.items())
        raise WeightUpdateError(f"{error}.\nNow {states}", server_weights=self.server_weights) from error

    def _leaving(self, client: SGLangClient) -> Callable[[], None]:
        def leave() -> None:
            if self.server_weights[client.url] == "new":
                return
            patience_s = min(_CLEANUP_TIMEOUT_S, client.config.control_timeout_s)
            try:
                if self._transfer is not None:
                    # Before all else: a healthy peer may be waiting for this server in a broadcast.
                    with suppress(RequestRejectedError):
                        self._transfer.leave(client, patience_s)
                if client.url in self._begun:
                    client.send(control.build_end_update(), timeout_s=patience_s)
                if self.server_weights[client.url] == "old":
                    if client.url in self._previous:
                        client.send(control.build_set_version(self._previous[client.url]), timeout_s=patience_s)
                    client.send(control.build_continue(), timeout_s=patience_s)
                else:
                    # Requests it holds answer with what they have instead of waiting for weights that don't come.
                    client.send(control.build_abort(), timeout_s=patience_s)
            except RequestRejectedError:
                self.server_weights[client.url] = "mixed"
            except SGLangError:
                self.server_weights[client.url] = "stuck"

        return leave

    # ------------------------------------------------------------------ calls

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start

    def _each(self, what: str, request: HttpRequest) -> None:
        self._run({client.url: partial(self._call, client, request, what) for client in self._clients})

    def _call(self, client: SGLangClient, request: HttpRequest, what: str) -> Any:
        limit_s: float = getattr(client.config, f"{request.timeout}_timeout_s")
        answer = client.send(request, timeout_s=min(limit_s, self._remaining()))
        control.check_success(answer, server=client.url, what=what)
        return answer

    def _run(self, calls: dict[str, Callable[[], Any]]) -> dict[str, Any]:
        if not calls:
            return {}
        outcomes = side_by_side(calls)
        failed = {url: outcome.error for url, outcome in outcomes.items() if outcome.error is not None}
        if failed:
            url, error = next(iter(failed.items()))
            others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            raise WeightUpdateError(f"{url}{others} failed during a weight update: {error}") from error
        return {url: outcome.unwrap() for url, outcome in outcomes.items()}

    def _remaining(self) -> float:
        return max(0.05, self._deadline - time.monotonic())
