"""Requests to one server from an event loop: keys, TLS and errors as in :class:`~torchrl_sglang.SGLangClient`."""

from __future__ import annotations

import asyncio
import errno
import json
import ssl
from collections.abc import AsyncGenerator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import httpx

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
from torchrl_sglang.tls import explain_tls, trusted_authorities

__all__ = ["ServerCalls"]

_LOCAL_ERRNOS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL, errno.ENETUNREACH}


class ServerCalls:
    """Sends requests to one server. Belongs to one event loop. Nothing is sent twice.

    Args:
        client: the server, its keys, time-outs and certificates.
    """

    def __init__(self, client: SGLangClient) -> None:
        self.client = client
        authorities = trusted_authorities(client.config.ca_certificate)
        self._verify: ssl.SSLContext | bool = False
        if client.url.startswith("https:"):
            self._verify = ssl.create_default_context(cafile=authorities if isinstance(authorities, str) else None)
        self._idle: list[httpx.AsyncClient] = []
        self._all: set[httpx.AsyncClient] = set()
        self._closing: set[asyncio.Task[None]] = set()

    async def send(self, request: HttpRequest, *, timeout_s: float | None = None) -> Any:
        """Send a request and return the parsed JSON of the answer, or its text if it is not JSON.

        Args:
            request: what to send.
            timeout_s: seconds to wait for the answer; ``None`` waits until the task is cancelled.

        Raises:
            SGLangError: as :meth:`SGLangClient.send`.
        """
        try:
            with self._connection(request) as http:
                response = await http.send(self._built(http, request, timeout_s))
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise self._translated(error, request) from error
        self._refuse(response, request)
        if "json" not in response.headers.get("content-type", ""):
            return response.text
        try:
            return response.json()
        except ValueError as error:
            raise ProtocolError(
                f"{self.client.url} answered {request.path} with something that is not JSON: {response.text[:200]!r}",
                server=self.client.url,
            ) from error

    async def stream(self, request: HttpRequest) -> AsyncGenerator[dict[str, Any], None]:
        """Send a request and yield its server-sent events; closing the iterator closes the connection.

        Raises:
            SGLangError: the same errors as :meth:`send`, also in the middle of the stream.
        """
        url = self.client.url
        try:
            with self._connection(request) as http:
                response = await http.send(self._built(http, request, None), stream=True)
                try:
                    if not response.is_success:
                        await response.aread()
                        self._refuse(response, request)
                    async for line in response.aiter_lines():
                        if not line.startswith("data:"):
                            continue
                        data = line[5:].strip()
                        if data == "[DONE]":
                            return
                        yield json.loads(data)
                finally:
                    await response.aclose()
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise self._translated(error, request) from error
        except json.JSONDecodeError as error:
            raise ProtocolError(f"{url} streamed an event that is not JSON", server=url) from error
        raise stream_cut_short(request, url=url)

    async def close(self) -> None:
        """Close all connections."""
        for http in list(self._all):
            await http.aclose()
        if self._closing:
            await asyncio.wait(self._closing)

    @contextmanager
    def _connection(self, request: HttpRequest) -> Iterator[httpx.AsyncClient]:
        """One connection, the one that was used last. httpx's own pool looks at all of them for each request.

        It is used again after an answer, and after a stream that was closed early. httpcore shields its bookkeeping
        from anyio's cancellation, not from :meth:`asyncio.Task.cancel`: after that its pool may count a connection as
        in use for ever, and the next request would wait for it.
        """
        http = self._idle.pop() if self._idle else self._opened()
        try:
            with self._counted(http) if request.timeout == "generate" else nullcontext():
                yield http
        except GeneratorExit:
            self._idle.append(http)
            raise
        except BaseException:
            self._discard(http)
            raise
        self._idle.append(http)

    def _counted(self, http: httpx.AsyncClient) -> AbstractContextManager[None]:
        """Let whoever takes the server out of the pool know of this request, and break it."""
        loop = asyncio.get_running_loop()

        def cut() -> None:
            with suppress(RuntimeError):  # the loop has ended, and all its requests
                loop.call_soon_threadsafe(self._discard, http)

        return self.client.sent_elsewhere(cut)

    def _discard(self, http: httpx.AsyncClient) -> None:
        self._all.discard(http)
        task = asyncio.get_running_loop().create_task(http.aclose())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _opened(self) -> httpx.AsyncClient:
        transport = httpx.AsyncHTTPTransport(
            verify=self._verify,
            trust_env=False,  # no proxy and no .netrc: the servers are the trainer's own
            limits=httpx.Limits(max_connections=1, keepalive_expiry=IDLE_LIMIT_S),
            socket_options=socket_options(),
        )
        http = httpx.AsyncClient(transport=transport, trust_env=False)
        self._all.add(http)
        return http

    def _built(self, http: httpx.AsyncClient, request: HttpRequest, timeout_s: float | None) -> httpx.Request:
        # Without a time-out the caller sets the deadline: an answer may take as long as the slowest sequence.
        return http.build_request(
            request.method,
            self.client.url + request.path,
            content=None if request.body is None else json.dumps(request.body),
            headers=self.client.headers(request),
            timeout=httpx.Timeout(timeout_s, connect=self.client.config.connect_timeout_s),
        )

    def _refuse(self, response: httpx.Response, request: HttpRequest) -> None:
        if not response.is_success:
            raise rejected(
                request,
                url=self.client.url,
                status=response.status_code,
                body=response.text,
                reason=response.reason_phrase,
                has_key="Authorization" in response.request.headers,
            )

    def _translated(self, error: Exception, request: HttpRequest) -> SGLangError:
        """This package's error for a request that got no answer."""
        url = self.client.url
        where = f"{url}{request.path}"
        if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
            if refusal := explain_tls(_with_causes(error), url):
                return refusal
            local = next((each for each in _causes(error) if _is_local(each)), None)
            if local is not None:
                return ServerUnreachableError(
                    f"this machine could not open a connection to {url}: {local}", server=url, is_local=True
                )
            return ServerUnreachableError(
                f"nothing accepts connections at {url}; is the server running and the address right?", server=url
            )
        if isinstance(error, httpx.TimeoutException):
            return ServerTimeoutError(f"{where} did not answer in time; the request may still be running", server=url)
        if isinstance(error, httpx.DecodingError):
            return ProtocolError(f"{where} sent something that can't be decoded: {error}", server=url)
        return ServerLostError(
            f"the connection to {where} broke after the request was sent ({error or type(error).__name__}); it may "
            "have run. If the server died, its log has the reason",
            server=url,
        )


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
