"""One server over HTTP: sends an :class:`HttpRequest`, translates every foreign error, knows what may be sent again."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

from torchrl_sglang.config import ClientConfig
from torchrl_sglang.errors import (
    ConfigError,
    ProtocolError,
    RequestRejectedError,
    ServerLostError,
    ServerTimeoutError,
    ServerUnreachableError,
)
from torchrl_sglang.model_files import read_model_json
from torchrl_sglang.protocol.dialect import (
    MODEL_INFO,
    SERVER_INFO,
    SESSION_PROBE,
    Dialect,
    parse_dialect,
    parse_info,
)
from torchrl_sglang.protocol.messages import HttpRequest, ServerInfo
from torchrl_sglang.protocol.version import WeightVersion
from torchrl_sglang.tls import explain_tls, trusted_authorities

__all__ = ["SGLangClient", "may_send_again", "read_vocab_size"]

# uvicorn closes a connection that was idle for 5 s. One of ours that idled nearly as long is not used again: the
# request could meet the close half-way, and then nobody knows whether it ran.
_IDLE_LIMIT_S = 3.0


def may_send_again(request: HttpRequest, error: Exception) -> bool:
    """The retry rule: only what cannot have run, or only reads, is sent a second time."""
    if isinstance(error, ServerUnreachableError):
        return True
    return request.repeatable and isinstance(error, ServerLostError)


class SGLangClient:
    """Talks to one SGLang server. Thread-safe; pickles as its address and settings, and reconnects where it lands.

    Args:
        url: base URL, e.g. ``"http://127.0.0.1:30000"``; ``"host:port"`` is taken as ``http``.
        config: time-outs, keys and connection limits.

    Raises:
        ConfigError: the URL is not one.

    Examples:
        >>> client = SGLangClient("127.0.0.1:30000")
        >>> client.url
        'http://127.0.0.1:30000'
    """

    def __init__(self, url: str, config: ClientConfig | None = None) -> None:
        self.url = _normalise(url)
        self.config = config or ClientConfig()
        self._init_runtime()

    def _init_runtime(self) -> None:
        self._lock = threading.Lock()
        self._sessions: dict[str, requests.Session] = {}
        self._last_used: dict[str, float] = {}
        self._info: ServerInfo | None = None
        self._dialect: Dialect | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._init_runtime()

    def __repr__(self) -> str:
        return f"SGLangClient({self.url!r})"

    # ------------------------------------------------------------------ what the server is

    def connect(self) -> ServerInfo:
        """Ask the server what it is; the answer is kept.

        Raises:
            ServerUnreachableError: nothing listens there.
            ProtocolError: something else listens there.
        """
        try:
            model_info = self.send(MODEL_INFO)
            server_info = self.send(SERVER_INFO)
        except RequestRejectedError as error:
            if error.status in (401, 403):
                raise
            raise ProtocolError(
                f"{self.url} answers {error.status} to /model_info: not an SGLang server, or a router. "
                "Connect to the servers themselves; a router can't take weight updates",
                server=self.url,
            ) from error
        self._dialect = parse_dialect(self._status(SESSION_PROBE))
        model_path = model_info.get("model_path", "") if isinstance(model_info, dict) else ""
        vocab_size = self.config.vocab_size or read_vocab_size(str(model_path))
        self._info = parse_info(model_info, server_info, url=self.url, vocab_size=vocab_size)
        return self._info

    @property
    def info(self) -> ServerInfo:
        """What the server said of itself; connects on first use."""
        return self._info or self.connect()

    @property
    def dialect(self) -> Dialect:
        """Which form of the contract the server speaks; connects on first use."""
        if self._dialect is None:
            self.connect()
        assert self._dialect is not None
        return self._dialect

    # ------------------------------------------------------------------ sending

    def send(self, request: HttpRequest, *, timeout_s: float | None = None) -> Any:
        """Send a request and return its parsed JSON (or its text, where the server answers text).

        Args:
            request: what to send.
            timeout_s: seconds to wait for the answer instead of the configured time-out.

        Raises:
            ServerUnreachableError: no connection was made, also not on the repeated tries.
            ServerLostError: the connection broke; the request may have run.
            ServerTimeoutError: no answer in time; the request may still be running.
            RequestRejectedError: the server answered no.
            ProtocolError: half a reply, or one that is not JSON though it says so.
        """
        response = self._send_with_retries(request, timeout_s, stream=False)
        return self._parse(request, response)

    def stream(self, request: HttpRequest, *, timeout_s: float | None = None) -> Iterator[dict[str, Any]]:
        """Send a request and yield its server-sent events; closing the iterator closes the connection.

        Raises:
            The same errors as :meth:`send`, also in the middle of the stream.
        """
        response = self._send_with_retries(request, timeout_s, stream=True)
        with response:
            self._raise_for_status(request, response)
            finished = False
            try:
                for line in response.iter_lines():
                    if not line.startswith(b"data:"):
                        continue
                    data = line[5:].strip()
                    if data == b"[DONE]":
                        finished = True
                        break
                    yield json.loads(data)
            except requests.exceptions.ChunkedEncodingError as error:
                raise self._cut_short(request) from error
            except requests.RequestException as error:
                raise self._translate(request, error, timeout_s) from error
            except json.JSONDecodeError as error:
                raise ProtocolError(f"{self.url} streamed an event that is not JSON", server=self.url) from error
            if not finished:
                raise self._cut_short(request)

    def weight_version(self) -> str:
        """Version string of the weights that the server holds at this moment.

        Raises:
            ServerError: it does not answer.
        """
        return str(self.send(MODEL_INFO)["weight_version"])

    def held_version(self) -> WeightVersion:
        """:meth:`weight_version`, parsed."""
        return WeightVersion.parse(self.weight_version())

    def _cut_short(self, request: HttpRequest) -> ServerLostError:
        return ServerLostError(f"{self.url} ended the stream of {request.path} half-way", server=self.url)

    def _send_with_retries(self, request: HttpRequest, timeout_s: float | None, *, stream: bool) -> requests.Response:
        tries = 0
        while True:
            try:
                return self._send_once(request, timeout_s, stream=stream)
            except requests.RequestException as foreign:
                error = self._translate(request, foreign, timeout_s)
                tries += 1
                if not may_send_again(request, error) or tries > self.config.connect_retries:
                    raise error from foreign
                time.sleep(0.05 * 2**tries)  # a server that restarts its listener needs a moment

    def _send_once(self, request: HttpRequest, timeout_s: float | None, *, stream: bool) -> requests.Response:
        wait_s = timeout_s if timeout_s is not None else getattr(self.config, f"{request.timeout}_timeout_s")
        # A server that is paused for an update freezes generation, whose connections may be all there are: what pauses
        # it and lets it go on has connections of its own.
        purpose = "generate" if request.timeout == "generate" else "control"
        session = self._fresh_session(purpose)
        try:
            return session.request(
                request.method,
                self.url + request.path,
                data=None if request.body is None else json.dumps(request.body),
                headers=self._headers(request),
                timeout=(self.config.connect_timeout_s, wait_s),
                stream=stream,
                allow_redirects=False,
            )
        finally:
            self._last_used[purpose] = time.monotonic()

    def _fresh_session(self, purpose: str) -> requests.Session:
        with self._lock:
            session = self._sessions.get(purpose)
            if session is None:
                self._sessions[purpose] = session = requests.Session()
                session.trust_env = False  # no proxy or .netrc of the environment between trainer and server
                session.verify = trusted_authorities(self.config.ca_certificate)
                adapter = HTTPAdapter(
                    pool_connections=1,
                    pool_maxsize=self.config.max_connections,
                    pool_block=purpose == "generate",
                    max_retries=0,
                )
                session.mount("http://", adapter)
                session.mount("https://", adapter)
            elif time.monotonic() - self._last_used[purpose] > _IDLE_LIMIT_S:
                session.close()  # drops idle connections only; requests under way keep theirs
            self._last_used[purpose] = time.monotonic()
            return session

    def _headers(self, request: HttpRequest) -> dict[str, str]:
        headers = {"Content-Type": "application/json"} if request.body is not None else {}
        key = self.config.api_key
        # With both keys set, SGLang opens control calls to the admin key only, and everything else to the other only.
        if request.timeout in ("control", "update") and self.config.admin_api_key is not None:
            key = self.config.admin_api_key
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        return headers

    def _status(self, request: HttpRequest) -> int:
        try:
            self.send(request)
        except RequestRejectedError as error:
            return error.status
        return 200

    # ------------------------------------------------------------------ answers

    def _parse(self, request: HttpRequest, response: requests.Response) -> Any:
        self._raise_for_status(request, response)
        if "json" not in response.headers.get("content-type", ""):
            return response.text
        try:
            return response.json()
        except ValueError as error:
            raise ProtocolError(
                f"{self.url} answered {request.path} with something that is not JSON: {response.text[:200]!r}",
                server=self.url,
            ) from error

    def _raise_for_status(self, request: HttpRequest, response: requests.Response) -> None:
        if response.ok and not response.is_redirect:
            return
        detail = _detail(response)
        advice = ""
        if response.status_code in (401, 403):
            advice = "; pass the server's key as api_key= (or admin_api_key=)"
        raise RequestRejectedError(
            f"{self.url} answered {response.status_code} to {request.path}: {detail}{advice}",
            server=self.url,
            status=response.status_code,
            detail=detail,
        )

    def _translate(self, request: HttpRequest, error: requests.RequestException, timeout_s: float | None) -> Exception:
        where = f"{self.url}{request.path}"
        reason = getattr(error.args[0], "reason", None) if error.args else None
        if isinstance(error, requests.exceptions.SSLError) and (refusal := explain_tls(error, self.url)):
            return refusal
        if isinstance(error, requests.ConnectTimeout) or isinstance(reason, (NewConnectionError, ConnectTimeoutError)):
            return ServerUnreachableError(
                f"nothing accepts connections at {self.url}; is the server running and the address right?",
                server=self.url,
            )
        if isinstance(error, requests.Timeout) or "timed out" in str(error):
            wait_s = timeout_s if timeout_s is not None else getattr(self.config, f"{request.timeout}_timeout_s")
            return ServerTimeoutError(
                f"{where} did not answer within {wait_s:g} s; the request may still be running "
                f"(ClientConfig.{request.timeout}_timeout_s sets the limit)",
                server=self.url,
            )
        if isinstance(error, (requests.exceptions.ChunkedEncodingError, requests.exceptions.ContentDecodingError)):
            return ProtocolError(f"{where} sent half a reply: {error}", server=self.url)
        if isinstance(error, requests.ConnectionError):
            return ServerLostError(
                f"the connection to {where} broke after the request was sent; it may have run, so it is not sent "
                "again. Did the server die? Its log tells",
                server=self.url,
            )
        return ProtocolError(f"{where}: {error}", server=self.url)

    def close(self) -> None:
        """Close idle connections. The client can still be used afterwards."""
        with self._lock:
            for session in self._sessions.values():
                session.close()
            self._sessions.clear()


def _normalise(url: str) -> str:
    full = url if "//" in url else f"http://{url}"
    parts = urlsplit(full.rstrip("/"))
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{url!r} is not the URL of a server; expected something like 'http://127.0.0.1:30000'")
    if parts.hostname in ("0.0.0.0", "::"):  # an address to listen on, not one to connect to
        loopback = "127.0.0.1" if parts.hostname == "0.0.0.0" else "[::1]"
        return f"{parts.scheme}://{loopback}" + (f":{parts.port}" if parts.port else "") + parts.path
    return parts.geturl()


def _detail(response: requests.Response) -> str:
    """The server's own words; it says errors as ``{"error": {"message"}}``, ``{"message"}``, ``{"detail"}`` or text."""
    try:
        value = response.json()
    except ValueError:
        return response.text[:500] or response.reason
    for _ in range(3):
        if not isinstance(value, dict):
            break
        value = next((value[key] for key in ("error", "message", "detail") if value.get(key)), str(value))
    return str(value)[:500]


def read_vocab_size(model_path: str) -> int | None:
    """Rows of the checkpoint's embedding, from its ``config.json``; ``None`` if that can't be read from here."""
    config = read_model_json(model_path, "config.json")
    for section in (config, config.get("text_config") or {}, config.get("llm_config") or {}):
        if isinstance(section.get("vocab_size"), int):
            return int(section["vocab_size"])
    return None
