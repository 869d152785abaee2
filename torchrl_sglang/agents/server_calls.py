"""Requests to one server from an event loop: keys, TLS and errors as in :class:`~torchrl_sglang.SGLangClient`."""

from __future__ import annotations

import asyncio
import errno
import json
import socket
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext, suppress
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any

import aiohttp
import orjson

from torchrl_sglang.agents.open_files import RESERVE, is_out_of_files
from torchrl_sglang.agents.server_events import END, Growth, event_data, event_lines
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.connections import IDLE_LIMIT_S, socket_options
from torchrl_sglang.errors import (
    ProtocolError,
    ServerLostError,
    ServerTimeoutError,
    ServerUnreachableError,
    SGLangError,
)
from torchrl_sglang.http_errors import rejected, stream_cut_short
from torchrl_sglang.protocol.messages import HttpRequest
from torchrl_sglang.proxies import refuse_web_page
from torchrl_sglang.tls import explain_tls, trusted_authorities

__all__ = ["ServerCalls"]

_LOCAL_ERRNOS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL, errno.ENETUNREACH}


_connected: ContextVar[Callable[[Any], None]] = ContextVar("connected", default=lambda _connection: None)
"""Called with the connection that a request gets."""
_FAILURES = (aiohttp.ClientError, asyncio.TimeoutError, OSError)


class ServerCalls:
    """Sends requests to one server. Belongs to one event loop. Nothing that may have run is sent twice.

    Args:
        client: the server, its keys, time-outs and certificates.
    """

    def __init__(self, client: SGLangClient) -> None:
        self.client = client
        authorities = trusted_authorities(client.config.ca_certificate)
        self._tls: ssl.SSLContext | bool = True
        if client.url.startswith("https:"):
            self._tls = ssl.create_default_context(cafile=authorities if isinstance(authorities, str) else None)
        self._http: aiohttp.ClientSession | None = None
        self._in_use = 0
        self._closing: set[asyncio.Task[None]] = set()
        self._is_retired = False

    async def send(self, request: HttpRequest, *, timeout_s: float | None = None) -> Any:
        """Send a request and return the parsed JSON of the answer, or its text if it is not JSON.

        Args:
            request: what to send.
            timeout_s: seconds to wait for the answer; ``None`` waits until the task is cancelled.

        Raises:
            SGLangError: as :meth:`SGLangClient.send`.
        """
        try:
            async with self._answer(request, timeout_s) as answer:
                body = await answer.read()
        except _FAILURES as error:
            raise self._translated(error, request) from error
        self._refuse(answer, body, request)
        if "json" not in answer.content_type and not body.startswith((b"{", b"[")):
            text = body.decode(errors="replace")
            refuse_web_page(request, url=self.client.url, body=text)
            return text
        try:
            return _parsed(body)
        except ValueError as error:
            raise ProtocolError(
                f"{self.client.url} answered {request.path} with something that is not JSON: {body[:200]!r}",
                server=self.client.url,
            ) from error

    async def stream(self, request: HttpRequest) -> AsyncGenerator[dict[str, Any], None]:
        """Send a request and yield its server-sent events; closing the iterator closes the connection.

        Where each event has all tokens so far, those that have been overtaken by the time they are read are left out:
        a gateway with many streams then reads as much as it has time for, instead of falling behind. Of a long answer
        only events that add a part of it are read (:class:`Growth`).

        Raises:
            SGLangError: the same errors as :meth:`send`, also in the middle of the stream.
        """
        url = self.client.url
        try:
            async with self._answer(request, None) as answer:
                if not answer.ok:
                    self._refuse(answer, await answer.read(), request)
                known = self.client.known_info  # `info` may ask the server, and all others would wait for its answer
                is_cumulative = known is not None and known.raw.get("incremental_streaming_output") is False
                growth = Growth()
                async for lines in event_lines(answer.content):
                    events = event_data(lines, latest_only=is_cumulative)
                    if not events:
                        refuse_web_page(request, url=url, body=b"\n".join(lines).decode(errors="replace"))
                    for data in growth.worth_reading(events) if is_cumulative else events:
                        if data == END:
                            return
                        yield _parsed(data)
        except _FAILURES as error:
            raise self._translated(error, request) from error
        except ValueError as error:
            raise ProtocolError(f"{url} streamed an event that is not JSON", server=url) from error
        raise stream_cut_short(request, url=url)

    async def close(self) -> None:
        """Close all connections."""
        self._start_closing()
        if self._closing:
            await asyncio.wait(self._closing)

    @property
    def is_open(self) -> bool:
        """Whether there may be open connections."""
        return self._http is not None or bool(self._closing)

    def retire(self) -> None:
        """Close the connections as soon as none is in use."""
        self._is_retired = True
        if not self._in_use:
            self._start_closing()

    def _start_closing(self) -> None:
        http, self._http = self._http, None
        if http is not None:
            task = asyncio.get_running_loop().create_task(http.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    @asynccontextmanager
    async def _answer(self, request: HttpRequest, timeout_s: float | None) -> AsyncIterator[aiohttp.ClientResponse]:
        if self._http is None:
            self._http = self._opened()
        self._in_use += 1
        try:
            with _Counted(self.client) if request.timeout == "generate" else nullcontext():
                # Without a time-out the caller sets the deadline: an answer takes as long as the slowest sequence.
                async with self._http.request(
                    request.method,
                    self.client.url + request.path,
                    data=None if request.body is None else _written(request.body),
                    headers=self.client.headers(request),
                    timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=self.client.config.connect_timeout_s),
                    allow_redirects=False,
                ) as answer:
                    yield answer
        finally:
            self._in_use -= 1
            if self._is_retired:
                self.retire()

    def _opened(self) -> aiohttp.ClientSession:
        connector = _Connector(
            limit=0,  # who asks limits how much is under way
            keepalive_timeout=IDLE_LIMIT_S,
            ssl=self._tls,
            socket_factory=_socket,
        )
        # no proxy and no .netrc: the servers are the trainer's own
        return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False)

    def _refuse(self, answer: aiohttp.ClientResponse, body: bytes, request: HttpRequest) -> None:
        if not 200 <= answer.status < 300:
            raise rejected(
                request,
                url=self.client.url,
                status=answer.status,
                body=body.decode(errors="replace"),
                reason=answer.reason or "",
                has_key="Authorization" in self.client.headers(request),
                headers=answer.headers,
            )

    def _translated(self, error: Exception, request: HttpRequest) -> SGLangError:
        """This package's error for a request that got no answer."""
        url = self.client.url
        where = f"{url}{request.path}"
        if isinstance(error, (aiohttp.ClientConnectorError, aiohttp.ClientSSLError, aiohttp.ConnectionTimeoutError)):
            if refusal := explain_tls(_with_causes(error), url):
                return refusal
            local = next((each for each in _causes(error) if _is_local(each)), None)
            if local is not None:
                advice = "; raise the limit of this process (ulimit -n)" if is_out_of_files(local) else ""
                return ServerUnreachableError(
                    f"this machine could not open a connection to {url}: {local}{advice}", server=url, is_local=True
                )
            return ServerUnreachableError(
                f"nothing accepts connections at {url}; is the server running and the address right?", server=url
            )
        if isinstance(error, asyncio.TimeoutError):
            return ServerTimeoutError(f"{where} did not answer in time; the request may still be running", server=url)
        if any(isinstance(each, aiohttp.http_exceptions.ContentEncodingError) for each in _causes(error)):
            return ProtocolError(f"{where} sent something that can't be decoded: {error}", server=url)
        return ServerLostError(
            f"the connection to {where} broke after the request was sent ({error or type(error).__name__}); it may "
            "have run. If the server died, its log has the reason",
            server=url,
        )


class _Counted:
    """Lets whoever takes a server out of the pool know of a request, and break its connection."""

    __slots__ = ("_before", "_connections", "_elsewhere", "_loop")

    def __init__(self, client: SGLangClient) -> None:
        self._loop = asyncio.get_running_loop()
        self._connections: list[aiohttp.connector.Connection] = []
        self._elsewhere: AbstractContextManager[None] = client.sent_elsewhere(self._cut)

    def __enter__(self) -> None:
        self._before: Token[Callable[[Any], None]] = _connected.set(self._connections.append)
        self._elsewhere.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(ValueError):  # a stream is closed in another context than it began in
            _connected.reset(self._before)
        self._elsewhere.__exit__(None, None, None)

    def _cut(self) -> None:
        with suppress(RuntimeError):  # the loop has ended, and all its requests
            self._loop.call_soon_threadsafe(self._abort)

    def _abort(self) -> None:
        for connection in self._connections:
            if connection.transport is not None:  # the answer has been read meanwhile
                connection.transport.abort()


class _Connector(aiohttp.TCPConnector):
    """Tells a request which connection it was given."""

    async def connect(self, req: Any, traces: list[Any], timeout: aiohttp.ClientTimeout) -> Any:
        connection = await super().connect(req, traces, timeout)
        _connected.get()(connection)
        return connection


def _parsed(data: bytes) -> Any:
    """An answer of a server: orjson reads the log-probs of an answer in a fifth of the time that ``json`` takes."""
    try:
        return orjson.loads(data)
    except ValueError:  # NaN, say, which an older server may write
        return json.loads(data)


def _written(body: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError:  # keys that are no texts, integers of more than 64 bits
        return json.dumps(body, default=_plain).encode()


def _plain(value: Any) -> Any:
    """Token ids of a prompt, which are an array."""
    return value.tolist()


def _causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _with_causes(error: BaseException) -> BaseException:
    """The error with its causes where :func:`~torchrl_sglang.tls.explain_tls` looks for them."""
    inner = next((each for each in _causes(error) if isinstance(each, ssl.SSLError)), None)
    return inner or error


def _is_local(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _LOCAL_ERRNOS


def _socket(address: tuple[Any, ...]) -> socket.socket:
    while True:
        try:
            made = socket.socket(*address[:3])
            break
        except OSError as error:
            if not (is_out_of_files(error) and RESERVE.release()):
                raise
    for option in socket_options():
        made.setsockopt(*option)
    return made
