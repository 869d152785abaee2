"""``RemoteGateway``: a gateway in another process or on another host, used as one in this process."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote, urlsplit

import requests

from torchrl_sglang.agents.gateway import AgentSession
from torchrl_sglang.agents.given_values import as_json_object, as_reward
from torchrl_sglang.agents.types import SessionInfo, SessionStatus, Trajectory
from torchrl_sglang.config.api_keys import read_key
from torchrl_sglang.config.checking import require, require_number
from torchrl_sglang.errors import (
    ConfigError,
    OverloadedError,
    ProtocolError,
    ServerError,
    ServerUnreachableError,
    SessionFinishedError,
    SessionKeyError,
    SGLangError,
    UnknownSessionError,
)
from torchrl_sglang.forks import renew_in_forked_children
from torchrl_sglang.model_files import load_tokenizer
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.proxies import retry_after_s
from torchrl_sglang.tls import trusted_authorities

__all__ = ["RemoteGateway"]

_CONNECT_S = 10.0
_AGAIN_S = 0.5
_PROXY_STATUSES = (429, 502, 503, 504)
"""Of a proxy that refuses for the moment, or does not reach the gateway. The gateway's own 429 has a code."""


class RemoteGateway:
    """The gateway that ``torchrl-sglang gateway`` serves elsewhere, with the methods of :class:`AgentGateway`.

    Agents reach it without this process. :class:`AgentCollector` takes it in place of an :class:`AgentGateway`; a
    trainer whose agents are run by someone else finds their sessions with :meth:`list_sessions`. The methods may be
    called from any thread.

    Weights are pushed to the servers as ever, by ``weight_sync_schemes`` or a :class:`WeightSync` of this process; the
    gateway takes no part in it, and reads each token's version from the servers' answers. It does not know of an
    adapter that is sent as one (``transport="lora"``): a collector refuses that.

    Args:
        url: its address, ``http://host:8000``.
        admin_key: the key with which it makes sessions; ``None`` where it has none, on this machine.
        admin_key_file: file with that key, instead.
        tokenizer: the model's tokenizer, for texts in batches; by default loaded from the path that the servers use.
        ca_certificate: PEM file of the private authority of an ``https://`` address.
        timeout_s: how long a try of a call waits while nothing comes from the gateway.
        unreachable_s: how long calls try again while the gateway can't be reached, such as while it is restarted; after
            this time calls fail at their first try, until one gets through or none was made for as long.

    Attributes:
        url: its address.

    Raises:
        ConfigError: a bad argument, a wrong key, or something else than a gateway listens there.
        ProtocolError: what listens there does not answer with JSON.
        ServerUnreachableError: nothing listens there.

    Examples:
        >>> gateway = RemoteGateway("http://10.0.0.7:8000", admin_key_file="gateway.key")     # doctest: +SKIP
        >>> for batch in AgentCollector(gateway, run_agent, tasks):                            # doctest: +SKIP
        ...     train_step(actor, group_advantages(batch))
    """

    def __init__(
        self,
        url: str,
        *,
        admin_key: str | None = None,
        admin_key_file: str | Path | None = None,
        tokenizer: Any = None,
        ca_certificate: str | None = None,
        timeout_s: float = 120.0,
        unreachable_s: float = 60.0,
    ) -> None:
        require(
            isinstance(url, str) and url.startswith(("http://", "https://")),
            f"url must be a gateway's address such as 'http://host:8000', got {url!r}",
        )
        require("@" not in urlsplit(url).netloc, "url has a user's name or password: only admin_key opens the gateway")
        require("/sessions" not in url, f"{url!r} is the address of a session; the gateway's own ends before /sessions")
        require_number("timeout_s", timeout_s, above=0)
        require_number("unreachable_s", unreachable_s, at_least=0)
        require(admin_key is None or admin_key_file is None, "give admin_key or admin_key_file, not both")
        self.url = url.rstrip("/")
        self._admin_key = read_key(admin_key_file) if admin_key_file is not None else admin_key
        self._timeout_s, self._unreachable_s = timeout_s, 0.0
        self._authorities = trusted_authorities(ca_certificate)
        self._http = self._opened()
        self._keys: dict[str, str] = {}
        self._tokenizer = tokenizer
        self._closed = threading.Event()
        self._missing_since: float | None = None
        self._failed_at = -math.inf
        about = self._send("GET", "/info")
        if not isinstance(about, dict) or "weight_version" not in about:
            raise ConfigError(f"{self.url} is no gateway of torchrl-sglang of this version: it answered {about!r:.100}")
        self._about = about
        self._newest = int(about["weight_version"])
        self._unreachable_s = unreachable_s
        renew_in_forked_children(self)

    def _opened(self) -> requests.Session:
        http = requests.Session()
        http.trust_env = False  # no proxy and no .netrc: the gateway is the trainer's own
        http.verify = self._authorities
        http.mount(self.url, requests.adapters.HTTPAdapter(pool_maxsize=64))
        return http

    def renew_after_fork(self) -> None:
        """Leave the connections to the parent; called in a forked child."""
        was_closed, self._closed = self._closed.is_set(), threading.Event()
        if was_closed:
            self._closed.set()
        self._http = self._opened()

    # ------------------------------------------------------------------ start and end

    def close(self) -> None:
        """Close the connections; calls that wait for the gateway fail. The gateway and its sessions stay."""
        self._closed.set()
        self._http.close()

    def __enter__(self) -> RemoteGateway:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def is_running(self) -> bool:
        """Whether it was not closed here."""
        return not self._closed.is_set()

    @property
    def weight_version(self) -> int:
        """The newest weights that are known to have sampled for an agent: those of the trajectories read here."""
        return self._newest

    def uses(self, pool: SGLangPool) -> bool:
        """Never: it generates through a pool in its own process."""
        return False

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens.

        Raises:
            ConfigError: there is no tokenizer on this machine.
        """
        if self._tokenizer is None:
            path = self._about["tokenizer_path"]
            try:
                self._tokenizer = load_tokenizer(path, self._about.get("revision"))
            except (OSError, ValueError) as error:
                raise ConfigError(
                    f"the servers' tokenizer {path!r} can't be loaded here: give RemoteGateway a tokenizer ({error})"
                ) from error
        text: str = self._tokenizer.decode(token_ids)
        return text

    # ------------------------------------------------------------------ sessions

    def create_session(self, *, tags: Mapping[str, Any] | None = None, ttl_s: float | None = None) -> AgentSession:
        """Make a session for one run of an agent; see :meth:`AgentGateway.create_session`."""
        require_number("ttl_s", ttl_s, optional=True, above=0)
        body: dict[str, Any] = {"tags": as_json_object("tags", tags)}
        if ttl_s is not None:
            body["ttl_s"] = ttl_s
        made = self._send("POST", "/sessions", body)
        self._keys[made["id"]] = made["api_key"]
        return AgentSession(id=made["id"], base_url=made["base_url"], api_key=made["api_key"])

    def get(self, session_id: str) -> SessionInfo:
        """A session's status and counts; see :meth:`AgentGateway.get`."""
        return SessionInfo(**self._send("GET", self._path(session_id), session=session_id))

    def list_sessions(self, status: SessionStatus | None = None) -> list[SessionInfo]:
        """All sessions that are kept, oldest first, also those that others have made.

        Args:
            status: only those of this status, such as ``"finished"``.

        Raises:
            ConfigError: the gateway has no admin key, without which nobody may see the sessions of others.
        """
        listed = self._send("GET", "/sessions" + ("" if status is None else f"?status={status}"))
        return [SessionInfo(**each) for each in listed]

    def reward(self, session_id: str, value: float, info: Mapping[str, Any] | None = None) -> SessionInfo:
        """Finish a session with its reward; see :meth:`AgentGateway.reward`."""
        body = {"reward": as_reward(value), "info": as_json_object("info", info)}
        return SessionInfo(**self._send("POST", f"{self._path(session_id)}/reward", body, session=session_id))

    def trajectories(self, session_id: str) -> list[Trajectory]:
        """What a session has recorded; see :meth:`AgentGateway.trajectories`."""
        answer = self._send("GET", f"{self._path(session_id)}/trajectories", session=session_id)
        found = [Trajectory.from_json(each) for each in answer]
        self._newest = max([self._newest, *(version for each in found for version in each.weight_versions)])
        return found

    def delete(self, session_id: str) -> None:
        """Abort what a session has under way, and forget it.

        Raises:
            UnknownSessionError: there is none of this id.
        """
        try:
            self._send("DELETE", self._path(session_id), session=session_id, waits=False)
        except UnknownSessionError:
            self._keys.pop(session_id, None)
            raise
        self._keys.pop(session_id, None)

    @staticmethod
    def _path(session_id: str) -> str:
        require(isinstance(session_id, str) and bool(session_id), f"a session is named by its id, got {session_id!r}")
        return f"/sessions/{quote(session_id, safe='')}"

    # ------------------------------------------------------------------ HTTP

    def _send(self, method: str, path: str, body: Any = None, *, session: str = "", waits: bool = True) -> Any:
        """Send a call, again while the gateway can't be reached: what it does twice, it does once.

        A session that was made twice, or could not be deleted, expires: a deletion does not wait for the gateway, and
        at its end a collector deletes many.
        """
        require(self.is_running, "the RemoteGateway was closed")
        if not waits and self._missing_since is not None and not self._is_forgotten(time.monotonic()):
            raise self._unreachable("no answer before")
        key = self._keys.get(session) or self._admin_key
        failing_since = math.inf
        while True:
            begun_at = time.monotonic()
            try:
                answer = self._http.request(
                    method,
                    self.url + path,
                    json=body,
                    headers={} if key is None else {"Authorization": f"Bearer {key}"},
                    timeout=(min(_CONNECT_S, self._timeout_s), self._timeout_s),
                    allow_redirects=False,
                )
            except requests.RequestException as error:
                failure: SGLangError = self._unreachable(type(error).__name__)
            else:
                if 200 <= answer.status_code < 300:
                    self._missing_since = None
                    return self._parsed(answer)
                failure = self._refusal(answer, session)
                if answer.status_code not in _PROXY_STATUSES or isinstance(failure, OverloadedError):
                    self._missing_since = None
                    raise failure
            # Of this call, too: others may get through while this one never does.
            failing_since = min(failing_since, time.monotonic(), self._note_failure(begun_at))
            if not waits or time.monotonic() + _AGAIN_S > failing_since + self._unreachable_s:
                raise failure
            if self._closed.wait(_AGAIN_S):
                raise ConfigError(f"the RemoteGateway was closed while a call waited for {self.url}") from failure

    def _note_failure(self, begun_at: float) -> float:
        """Since when the gateway is missing, for all calls alike: they end together."""
        since = self._missing_since
        if since is None or self._is_forgotten(begun_at):
            since = time.monotonic()
        self._missing_since, self._failed_at = since, time.monotonic()
        return since

    def _is_forgotten(self, now: float) -> bool:
        """Whether the latest failure is older than calls wait, and so says nothing of now."""
        return now - self._failed_at > max(self._unreachable_s, _AGAIN_S)

    def _unreachable(self, why: str) -> ServerUnreachableError:
        return ServerUnreachableError(
            f"the gateway {self.url} can't be reached ({why}): is it running, and the address right?", server=self.url
        )

    def _parsed(self, answer: requests.Response) -> Any:
        try:
            return answer.json()
        except ValueError as error:
            raise ProtocolError(
                f"{self.url} answered with something that is not JSON: not a gateway has answered, but a proxy or "
                f"another web server: {answer.text[:100]!r}",
                server=self.url,
            ) from error

    def _refusal(self, answer: requests.Response, session: str) -> SGLangError:
        """This package's error for an answer."""
        try:
            told = answer.json()["error"]
            message, code = str(told["message"]), told["code"]
        except (ValueError, KeyError, TypeError):
            message, code = answer.text[:200] or answer.reason, None
        text = f"the gateway {self.url} answered {answer.status_code}: {message}"
        if code == "session_not_found":
            return UnknownSessionError(text, session=session)
        if code == "session_finished":
            return SessionFinishedError(text, session=session)
        if code == "rate_limit_exceeded":
            return OverloadedError(text, retry_after_s=retry_after_s(answer.status_code, answer.headers) or 1.0)
        if answer.status_code == 401 and session:
            return SessionKeyError(text, session=session)
        if answer.status_code in (401, 403):
            return ConfigError(f"{text} (admin_key of RemoteGateway)")
        if answer.status_code == 404:
            return ConfigError(f"{text}. Is it the address of a gateway of torchrl-sglang, of this version?")
        if 300 <= answer.status_code < 400:
            return ConfigError(
                f"{text}: it sends calls on to {answer.headers.get('location')!r:.200}; give that address"
            )
        if 400 <= answer.status_code < 500 and answer.status_code not in _PROXY_STATUSES:
            return ConfigError(text)
        return ServerError(text, server=self.url)

    def __repr__(self) -> str:
        return f"RemoteGateway({self.url!r})"
