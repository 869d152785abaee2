"""HTTP client of one SGLang server: keys, time-outs, connections, and the retry of requests that cannot have run."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import requests
from requests.adapters import HTTPAdapter

from torchrl_sglang.config import ClientConfig
from torchrl_sglang.errors import ProtocolError, RequestRejectedError
from torchrl_sglang.http_errors import may_retry, raise_for_status, stream_cut_short, translate_error
from torchrl_sglang.model_files import read_vocab_size
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
from torchrl_sglang.server_url import base_url
from torchrl_sglang.tls import trusted_authorities

__all__ = ["SGLangClient"]

# uvicorn closes a connection that was idle for 5 s. A connection that was idle for nearly as long is not used again:
# if the server closes it while a request is on its way, nobody knows whether the request ran.
_IDLE_LIMIT_S = 3.0


class SGLangClient:
    """Sends requests to one SGLang server. Thread-safe. A pickled copy opens connections of its own.

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
        self.url = base_url(url)
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

    # ------------------------------------------------------------------ server info

    def connect(self) -> ServerInfo:
        """Read the server's model, settings and API version, and keep them.

        Raises:
            ServerUnreachableError: nothing listens at the URL.
            ProtocolError: something other than an SGLang server listens at the URL.
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
        """The server's model and settings; connects on first use."""
        return self._info or self.connect()

    @property
    def dialect(self) -> Dialect:
        """Which version of SGLang's API the server has; connects on first use."""
        if self._dialect is None:
            self.connect()
        assert self._dialect is not None
        return self._dialect

    # ------------------------------------------------------------------ sending

    def send(self, request: HttpRequest, *, timeout_s: float | None = None) -> Any:
        """Send a request and return the parsed JSON of the answer, or its text if it is not JSON.

        Args:
            request: what to send.
            timeout_s: seconds to wait for the answer instead of the configured time-out.

        Raises:
            ServerUnreachableError: no connection was made, and no retry made one.
            ServerLostError: the connection broke; the request may have run.
            ServerTimeoutError: no answer in time; the request may still be running.
            RequestRejectedError: the server answered with an error status.
            ProtocolError: half a reply, or invalid JSON.
        """
        response = self._send_with_retries(request, timeout_s, stream=False)
        return self._parse(request, response)

    def stream(self, request: HttpRequest, *, timeout_s: float | None = None) -> Iterator[dict[str, Any]]:
        """Send a request and yield its server-sent events; closing the iterator closes the connection.

        Raises:
            SGLangError: the same errors as :meth:`send`, also in the middle of the stream.
        """
        response = self._send_with_retries(request, timeout_s, stream=True)
        with response:
            raise_for_status(response, request, url=self.url)
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
                raise stream_cut_short(request, url=self.url) from error
            except requests.RequestException as error:
                raise self._translate(error, request, timeout_s) from error
            except json.JSONDecodeError as error:
                raise ProtocolError(f"{self.url} streamed an event that is not JSON", server=self.url) from error
            if not finished:
                raise stream_cut_short(request, url=self.url)

    def weight_version(self) -> str:
        """Version string of the weights that the server holds at this moment.

        Raises:
            ServerError: it does not answer.
        """
        return str(self.send(MODEL_INFO)["weight_version"])

    def held_version(self) -> WeightVersion:
        """:meth:`weight_version`, parsed."""
        return WeightVersion.parse(self.weight_version())

    def _send_with_retries(self, request: HttpRequest, timeout_s: float | None, *, stream: bool) -> requests.Response:
        tries = 0
        while True:
            try:
                return self._send_once(request, timeout_s, stream=stream)
            except requests.RequestException as foreign:
                error = self._translate(foreign, request, timeout_s)
                tries += 1
                if not may_retry(request, error) or tries > self.config.connect_retries:
                    raise error from foreign
                time.sleep(0.05 * 2**tries)  # a server that restarts its listener needs a moment

    def _send_once(self, request: HttpRequest, timeout_s: float | None, *, stream: bool) -> requests.Response:
        # While a server is paused, requests for generation may hold all connections of their session: the calls that
        # pause it and continue have a session of their own.
        purpose = "generate" if request.timeout == "generate" else "control"
        session = self._fresh_session(purpose)
        try:
            return session.request(
                request.method,
                self.url + request.path,
                data=None if request.body is None else json.dumps(request.body),
                headers=self._headers(request),
                timeout=(self.config.connect_timeout_s, self._wait_s(request, timeout_s)),
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
                session.trust_env = False  # no proxy and no .netrc: the servers are the trainer's own
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
                session.close()  # closes idle connections only, not those of running requests
            self._last_used[purpose] = time.monotonic()
            return session

    def _headers(self, request: HttpRequest) -> dict[str, str]:
        headers = {"Content-Type": "application/json"} if request.body is not None else {}
        key = self.config.api_key
        # With both keys set, SGLang accepts only the admin key for control calls, and only the other key elsewhere.
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

    def _parse(self, request: HttpRequest, response: requests.Response) -> Any:
        raise_for_status(response, request, url=self.url)
        if "json" not in response.headers.get("content-type", ""):
            return response.text
        try:
            return response.json()
        except ValueError as error:
            raise ProtocolError(
                f"{self.url} answered {request.path} with something that is not JSON: {response.text[:200]!r}",
                server=self.url,
            ) from error

    def _wait_s(self, request: HttpRequest, timeout_s: float | None) -> float:
        configured: float = getattr(self.config, f"{request.timeout}_timeout_s")
        return configured if timeout_s is None else timeout_s

    def _translate(self, error: requests.RequestException, request: HttpRequest, timeout_s: float | None) -> Exception:
        return translate_error(error, request, url=self.url, wait_s=self._wait_s(request, timeout_s))

    def close(self) -> None:
        """Close idle connections. The client can still be used afterwards."""
        with self._lock:
            for session in self._sessions.values():
                session.close()
            self._sessions.clear()
