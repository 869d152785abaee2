"""HTTP client of one SGLang server: keys, time-outs, connections, and the retry of requests that cannot have run."""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import requests

from torchrl_sglang.config import ClientConfig
from torchrl_sglang.connections import ServerConnections
from torchrl_sglang.errors import ProtocolError, RequestRejectedError
from torchrl_sglang.forks import renew_in_forked_children
from torchrl_sglang.http_errors import (
    may_retry,
    raise_for_status,
    refused_for_s,
    refused_until_cut,
    stream_cut_short,
    translate_error,
)
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
from torchrl_sglang.proxies import refuse_web_page
from torchrl_sglang.server_url import base_url

__all__ = ["SGLangClient"]

_LEAST_RETRY_S = 0.1
_SYNCED_FOLDER = re.compile(r"version-[0-9]+-.+")
"""Name of a folder that the transport ``disk`` writes."""


class SGLangClient:
    """Sends requests to one SGLang server. Thread-safe. A pickled copy and a forked child open their own connections.

    Args:
        url: base URL, e.g. ``"http://127.0.0.1:30000"``; ``"host:port"`` is taken as ``http``.
        config: time-outs, keys and connection limits.

    Raises:
        ConfigError: the URL is not one.

    Attributes:
        heard_at: when the server last answered (``time.monotonic()``).

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
        self._connections = ServerConnections(self.url, self.config)
        self._info: ServerInfo | None = None
        self._dialect: Dialect | None = None
        self.heard_at = -math.inf
        renew_in_forked_children(self)

    def renew_after_fork(self) -> None:
        """Forget the parent's connections; called in a forked child."""
        self._init_runtime()

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._init_runtime()

    def __repr__(self) -> str:
        return f"SGLangClient({self.url!r})"

    # ------------------------------------------------------------------ server info

    def connect(self, check: Callable[[ServerInfo], None] | None = None) -> ServerInfo:
        """Read the server's model, settings and API version, and keep them.

        Args:
            check: called with what was read before it is kept; what it raises leaves what is known as it is.

        Raises:
            ServerUnreachableError: nothing listens at the URL.
            ProtocolError: something other than an SGLang server listens at the URL.
        """
        try:
            model_info = self.send(MODEL_INFO)
            server_info = self.send(SERVER_INFO)
        except RequestRejectedError as error:
            if error.status in (401, 403) or error.is_from_proxy:
                raise
            raise ProtocolError(
                f"{self.url} answers {error.status} to /model_info: not an SGLang server, or a router. "
                "Connect to the servers themselves; a router can't take weight updates",
                server=self.url,
            ) from error
        dialect = parse_dialect(self._status(SESSION_PROBE))
        model_info = _with_lasting_path(model_info)
        model_path = model_info.get("model_path", "") if isinstance(model_info, dict) else ""
        revision = server_info.get("revision") if isinstance(server_info, dict) else None
        vocab_size = self.config.vocab_size or read_vocab_size(str(model_path), revision)
        info = parse_info(model_info, server_info, url=self.url, vocab_size=vocab_size)
        if check is not None:
            check(info)
        self._info, self._dialect = info, dialect
        return info

    @property
    def info(self) -> ServerInfo:
        """The server's model and settings; connects on first use."""
        return self._info or self.connect()

    @property
    def known_info(self) -> ServerInfo | None:
        """:attr:`info` as it was last read; ``None`` before the first time. Sends nothing."""
        return self._info

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
        with self._connections.slot(_purpose(request), self._wait_s(request, timeout_s)) as left_s:
            response = self._send_with_retries(request, left_s, stream=False)
            return self._parse(request, response)

    def stream(self, request: HttpRequest, *, timeout_s: float | None = None) -> Iterator[dict[str, Any]]:
        """Send a request and yield its server-sent events; closing the iterator closes the connection.

        Raises:
            SGLangError: the same errors as :meth:`send`, also in the middle of the stream.
        """
        with self._connections.slot("stream", self._wait_s(request, timeout_s)) as left_s:
            yield from self._events(request, left_s)

    def _events(self, request: HttpRequest, wait_s: float) -> Iterator[dict[str, Any]]:
        with self._send_with_retries(request, wait_s, stream=True) as response:
            raise_for_status(response, request, url=self.url)
            finished = False
            last_event = time.monotonic()
            try:
                for line in response.iter_lines():
                    if not line.startswith(b"data:"):
                        refuse_web_page(request, url=self.url, body=line.decode(errors="replace"))
                        if time.monotonic() - last_event > wait_s:  # a proxy's signs of life are no events
                            raise requests.ReadTimeout
                        continue
                    data = line[5:].strip()
                    if data == b"[DONE]":
                        finished = True
                        break
                    yield json.loads(data)
                    last_event = time.monotonic()
            except requests.exceptions.ChunkedEncodingError as error:
                raise stream_cut_short(request, url=self.url) from error
            except requests.RequestException as error:
                raise translate_error(error, request, url=self.url, wait_s=wait_s) from error
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

    def _send_with_retries(self, request: HttpRequest, wait_s: float, *, stream: bool) -> requests.Response:
        tries = 0
        deadline, left_s = time.monotonic() + wait_s, wait_s
        cut = threading.Event() if _purpose(request) == "control" else self._connections.when_cut
        while True:
            try:
                response = self._send_once(request, left_s, stream=stream)
                again_s = refused_for_s(request, response)
                if again_s is None or time.monotonic() + again_s >= deadline:
                    return response
                response.close()
                if cut.wait(max(_LEAST_RETRY_S, again_s)):
                    raise refused_until_cut(request, url=self.url, status=response.status_code)
                if not stream:  # whose limit is the time between two events
                    left_s = max(_LEAST_RETRY_S, deadline - time.monotonic())
            except requests.RequestException as foreign:
                error = translate_error(foreign, request, url=self.url, wait_s=wait_s)
                tries += 1
                if not may_retry(request, error) or tries > self.config.connect_retries:
                    raise error from foreign
                time.sleep(0.05 * 2**tries)  # a server that restarts its listener needs a moment

    def _send_once(self, request: HttpRequest, wait_s: float, *, stream: bool) -> requests.Response:
        response = self._connections.session("stream" if stream else _purpose(request)).request(
            request.method,
            self.url + request.path,
            data=request.content(),
            headers=self.headers(request),
            timeout=(self.config.connect_timeout_s, wait_s),
            stream=stream,
            allow_redirects=False,
        )
        self.heard_at = time.monotonic()
        return response

    def headers(self, request: HttpRequest) -> dict[str, str]:
        """The headers of a request: its content's type, and the key."""
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
            if error.is_from_proxy:
                raise
            return error.status
        return 200

    def _parse(self, request: HttpRequest, response: requests.Response) -> Any:
        raise_for_status(response, request, url=self.url)
        if "json" not in response.headers.get("content-type", "") and not response.content.startswith((b"{", b"[")):
            refuse_web_page(request, url=self.url, body=response.text)
            return response.text
        try:
            return response.json()
        except ValueError as error:
            raise ProtocolError(
                f"{self.url} answered {request.path} with something that is not JSON: {response.text[:200]!r}",
                server=self.url,
            ) from error

    def _wait_s(self, request: HttpRequest, timeout_s: float | None) -> float:
        if timeout_s is not None:
            return timeout_s
        if request.timeout == "generate":
            return self.config.generate_limit_s()
        configured: float = getattr(self.config, f"{request.timeout}_timeout_s")
        return configured

    @property
    def num_generating(self) -> int:
        """Number of generate requests of this client under way."""
        return self._connections.num_generating

    def sent_elsewhere(self, cut: Callable[[], None]) -> AbstractContextManager[None]:
        """Count a generate request that another object sends to this server, over a connection of its own.

        Args:
            cut: breaks that connection; called from any thread.
        """
        return self._connections.sent_elsewhere(cut)

    def cut(self) -> None:
        """Break the connections of generate requests under way, which then fail with :class:`ServerLostError`.

        One that waits until a server or a proxy takes it fails with :class:`ServerUnreachableError`: it has not run.
        """
        self._connections.cut()

    def close(self) -> None:
        """Close idle connections. The client can still be used afterwards."""
        self._connections.close()


def _with_lasting_path(model_info: Any) -> Any:
    """Replace the model's path by the tokenizer's if it is a folder of synced weights that is there no more.

    After an update from a shared folder a server names that folder as its model (0.5.23), and later updates delete it.
    """
    if not isinstance(model_info, dict):
        return model_info
    model, tokenizer = Path(str(model_info.get("model_path"))), model_info.get("tokenizer_path")
    is_gone = _SYNCED_FOLDER.fullmatch(model.name) is not None and not model.exists()
    if not is_gone or not tokenizer or read_vocab_size(str(tokenizer)) is None:
        return model_info
    return {**model_info, "model_path": tokenizer}


def _purpose(request: HttpRequest) -> Literal["generate", "control"]:
    """While a server is paused, generate requests may hold all their connections: control calls have others."""
    return "generate" if request.timeout == "generate" else "control"
