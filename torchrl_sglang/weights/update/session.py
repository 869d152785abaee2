"""One weight update on the servers: pause, mark dirty, begin, send, end, flush, new version, continue.

::

    with UpdateSession(pool, clients, version=..., config=..., deadline=..., report=...) as session:
        session.begin()
        ...                       # a transport sends the buckets

Leaving the block without an error finishes the update on every server. After an error, a server that received nothing
continues with its old weights; one that may have received something stays paused, marked dirty and quarantined until a
full sync succeeds; one that does not answer is reported as stuck.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal, NoReturn

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
from torchrl_sglang.protocol.messages import HttpRequest
from torchrl_sglang.protocol.version import WeightVersion
from torchrl_sglang.weights.group.process_group import WeightGroup
from torchrl_sglang.weights.group.trainer_mark import TrainerMark, update_under_way
from torchrl_sglang.weights.update.recovery import Recovery
from torchrl_sglang.weights.update.report import SyncReport

__all__ = ["UpdateSession"]

_MOST_NAMED = 8
"""Servers that an error's message names; ``server_weights`` has all."""

_WEIGHTS_IN_WORDS: dict[ServerWeights, str] = {
    "old": "serves its old weights",
    "new": "serves the new weights",
    "mixed": "holds mixed weights and serves nothing until all weights are sent again",
    "stuck": "does not answer and has to be restarted",
}


class UpdateSession:
    """A ``with`` block around one update; used once.

    It records what it learns of each server in the pool's state, and keeps no copy.

    Args:
        pool: the servers.
        clients: the servers that this update goes to.
        version: what the weights are called.
        config: pause mode and cache handling.
        deadline: ``time.monotonic()`` value by which everything has to be done.
        report: records phases, pause mode and the time without generation.
        mark: names the process groups of this update in the servers' dirty version, so that another trainer can
            destroy them; ``None`` is the version's owner.
        groups: process groups that the update goes over; after a failure the servers first leave them.

    Raises:
        ConfigError: these servers can't do what ``config`` asks for.

    Attributes:
        adapter: ``None``: this update changes no adapter.
        is_joining: the servers get no requests yet, and the pool's other servers hold these weights already.
    """

    adapter: str | None = None
    is_joining = False

    def __init__(
        self,
        pool: SGLangPool,
        clients: Sequence[SGLangClient],
        *,
        version: WeightVersion,
        config: SyncConfig,
        deadline: float,
        report: SyncReport,
        mark: str | None = None,
        groups: Sequence[WeightGroup] = (),
    ) -> None:
        self.report = report
        self._pool = pool
        self._state = pool.state
        self._clients = tuple(clients)
        self._version = version
        self._mark = TrainerMark.own(mark or version.owner or "")
        self._dirty = str(WeightVersion(number=version.number, owner=str(self._mark), dirty=True))
        self._under_way = update_under_way(self._mark)
        self._config = config
        self._deadline = deadline
        self._failed: dict[str, SGLangError] = {}
        self._recovery = Recovery(pool, clients, dirty=self._dirty, groups=groups)
        self._pause_mode: Literal["abort", "retract", "in_place"] = "abort"
        self._paused_at = 0.0
        self._flushed = False
        self._legacy = not all(client.dialect.weight_session for client in clients)
        if self._legacy and config.pause == "retract" and config.cache == "flush":
            raise ConfigError(
                "SGLang before 0.5.21 can't flush its prefix cache while retracted requests are queued (it ends): "
                "use SyncConfig(pause='abort')"
            )

    @property
    def clients(self) -> tuple[SGLangClient, ...]:
        """The servers that this update goes to."""
        return self._clients

    @property
    def server_weights(self) -> dict[str, ServerWeights]:
        """Per server URL what it holds at this moment."""
        return {client.url: self._state.server(client.url).weights for client in self._clients}

    @property
    def flushes(self) -> bool:
        """Whether the prefix caches are to be emptied.

        Requests frozen in place keep their KV cache, and a flush is refused because of them: new requests get a salt.
        """
        return self._config.cache == "flush" and self._pause_mode != "in_place"

    def __enter__(self) -> UpdateSession:
        self._under_way.__enter__()
        try:
            self._open()
        except BaseException as error:  # noqa: BLE001  servers are left in a good state on Ctrl-C too; raised below
            try:
                self._recovery.clean_up(error)
            finally:
                self._under_way.__exit__(None, None, None)
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
            self._recovery.clean_up(failure)
            self._raise(failure)
        finally:
            self._under_way.__exit__(None, None, None)

    # ------------------------------------------------------------------ what a transport calls

    def begin(self) -> None:
        """Open the update session on every server, for transports that send buckets.

        Raises:
            WeightUpdateError: a server refused or did not answer.
        """
        with self.report.phase("begin"):
            self._run({client.url: self._beginning(client) for client in self._clients})

    def received(self, *, flushed: bool, failed: Mapping[str, SGLangError] | None = None) -> None:
        """All weights have been sent.

        Args:
            flushed: the servers emptied their prefix caches with the last of them.
            failed: servers that dropped out on the way, while the others went on.
        """
        self._flushed = flushed
        self._failed = dict(failed or {})

    def load_from_disk(self, path: str) -> None:
        """Make every server load a checkpoint folder. It needs no update session: servers open their own.

        Raises:
            WeightUpdateError: a server can't read it.
        """
        with self.report.phase("transfer"):
            for client in self._clients:
                self._state.weights_changed(client.url, "mixed")
            request = control.build_update_from_disk(path, version=self._dirty, flush_cache=self.flushes)
            # All servers read from one disk.
            load_s = self._config.bucket_limit_s(self.report.num_bytes * len(self._clients))
            self._each("loading a checkpoint", request, at_least_s=load_s)
        self.received(flushed=self.flushes)

    # ------------------------------------------------------------------ opening

    def _open(self) -> None:
        with self.report.phase("pause"):
            for client in self._clients:
                self._state.update_started(client.url)
            self._pause_mode = self._choose_pause()
            self.report.pause = self._pause_mode
            self._paused_at = time.monotonic()
            self._each("pausing", control.build_pause(self._pause_mode))
        with self.report.phase("begin"):
            self._run({client.url: self._recording_version(client) for client in self._clients})
            self._each("marking its weights dirty", control.build_set_version(self._dirty))

    def _choose_pause(self) -> Literal["abort", "retract", "in_place"]:
        if self.is_joining:
            return "abort"
        if self._config.pause != "auto":
            return self._config.pause
        if self._legacy:
            return "abort"
        request = control.build_loads()
        loads = self._each("telling its load", request)
        if any(control.parse_loads(load) > 0 for load in loads):
            return "retract"
        return "abort"  # immediate when nothing runs, and unlike the other modes it lets an idle scheduler sleep

    def _recording_version(self, client: SGLangClient) -> Callable[[], None]:
        def record() -> None:
            held = client.weight_version()
            self._state.update_version_read(client.url, held)
            mark = TrainerMark.parse(WeightVersion.parse(held).owner or "")
            if mark.owner != self._mark.owner and mark.is_alive() and not self._config.takeover:
                raise WeightUpdateError(f"another trainer ({mark.owner}) has begun an update of {client.url}")

        return record

    def _beginning(self, client: SGLangClient) -> Callable[[], None]:
        """Open the update session; one that a dead trainer left open is closed first.

        A session on a server that nobody has marked belongs to a trainer that has begun after we looked, or to another
        program: it is left alone.
        """

        def begin() -> None:
            if not client.dialect.weight_session:
                return
            request = control.build_begin_update()
            try:
                self._call(client, request, "opening the update session")
            except RequestRejectedError as error:
                if "already open" not in error.detail:
                    raise
                is_marked = WeightVersion.parse(self._state.server(client.url).version_before).dirty
                self._state.weights_changed(client.url, "mixed")  # what the other trainer has sent is unknown
                if not is_marked and not self._config.takeover:
                    raise WeightUpdateError(
                        f"{client.url} has an update session open that another program has opened, and may be in use. "
                        f"If it is not, close it with SyncConfig(takeover=True){self._hint_of_two_names()}"
                    ) from error
                self._call(client, control.build_end_update(), "closing a left-over update session")
                self._call(client, request, "opening the update session")
            self._state.session_opened(client.url)

        return begin

    def _hint_of_two_names(self) -> str:
        several = len(self._clients) > 1
        return (
            ". If two URLs of this pool lead to the same server, the session is its own: name it once"
            if several
            else ""
        )

    # ------------------------------------------------------------------ finishing

    def _finish(self) -> None:
        """Finish each server by itself: if one fails in the last step, the others still serve."""
        if not self.is_joining:
            # Of this update alone: a version is pushed again after a failure, and by then has made cached prefixes.
            self._state.caches_salted(None if self.flushes else f"{self._version}.{uuid.uuid4().hex[:8]}")
        finishing = [client for client in self._clients if client.url not in self._failed]
        with self.report.phase("end"):
            self._run({client.url: self._ending(client) for client in finishing})
        self.report.generation_paused_s = time.monotonic() - self._paused_at
        for error in self._failed.values():
            raise error

    def _ending(self, client: SGLangClient) -> Callable[[], None]:
        def end() -> None:
            if self._state.server(client.url).session_open:
                self._call(client, control.build_end_update(), "closing the update session")
                self._state.session_closed(client.url)
            if self.flushes and not self._flushed:
                # Costs a garbage collection on the server that flushing with the last bucket doesn't.
                self._call(client, control.build_flush(), "flushing its prefix cache")
            version = str(self._version)
            self._state.version_claimed(self._version.number)
            self._call(client, control.build_set_version(version), "taking the new version")
            self._call(client, control.build_continue(), "continuing")
            self._state.update_finished(client.url, version, complete_from=self._version.owner or "")

        return end

    def reject(self, error: WeightUpdateError) -> None:
        """Verification failed after the update: pause the servers named by ``error`` and mark them dirty again."""
        rejected = [client for client in self._clients if client.url in error.server_weights]
        reason = f"its verification failed ({error})"
        self._recovery.withdraw(rejected, reason)
        for client in rejected:
            self._state.update_rejected(client.url, str(self._version))
        error.server_weights.update(self.server_weights)

    # ------------------------------------------------------------------ after a failure

    def _raise(self, error: BaseException) -> NoReturn:
        """Raise an error of this package with what each server holds now and what to do; any other error as it is."""
        if isinstance(error, WeightCoverageError):
            error.server_weights.update(self.server_weights)
        if isinstance(error, WeightCoverageError) or not isinstance(error, SGLangError):
            raise error
        states = _in_words(self.server_weights)
        raise WeightUpdateError(f"{error}.\nNow {states}", server_weights=self.server_weights) from error

    # ------------------------------------------------------------------ calls

    def _each(self, what: str, request: HttpRequest, *, at_least_s: float = 0.0) -> list[Any]:
        calls = {each.url: partial(self._call, each, request, what, at_least_s) for each in self._clients}
        return self._run(calls)

    def _call(self, client: SGLangClient, request: HttpRequest, what: str, at_least_s: float = 0.0) -> Any:
        if self._recovery.is_replaced(client):
            raise WeightUpdateError(f"{client.url} has ended and is restarted")
        limit_s = max(getattr(client.config, f"{request.timeout}_timeout_s"), at_least_s)
        answer = client.send(request, timeout_s=min(limit_s, self._remaining()))
        control.check_success(answer, server=client.url, what=what)
        return answer

    def _run(self, calls: Mapping[str, Callable[[], Any]]) -> list[Any]:
        outcomes = side_by_side(calls) if calls else {}
        failed = {url: outcome.error for url, outcome in outcomes.items() if outcome.error is not None}
        if failed:
            url, error = next(iter(failed.items()))
            others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            raise WeightUpdateError(f"{url}{others} failed during a weight update: {error}") from error
        return [outcome.value for outcome in outcomes.values()]

    def _remaining(self) -> float:
        return max(0.05, self._deadline - time.monotonic())


def _in_words(server_weights: Mapping[str, ServerWeights]) -> str:
    """What the servers hold; of many that hold the same, the first ones are named."""
    by_weights: dict[ServerWeights, list[str]] = {}
    for url, weights in server_weights.items():
        by_weights.setdefault(weights, []).append(url)
    parts = []
    for weights, urls in by_weights.items():
        words = _WEIGHTS_IN_WORDS[weights]
        parts += [f"{url} {words}" for url in urls[:_MOST_NAMED]]
        if len(urls) > _MOST_NAMED:
            parts[-1] += f", and so does each of {len(urls) - _MOST_NAMED} more"
    return "; ".join(parts)
