"""One request to the fake server, the reply to it, and the points at which armed faults take effect."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.fake_sglang.faults import Fault, FaultPoint
from tests.fake_sglang.scheduler import ServerStopped

__all__ = ["BadRequest", "Call", "Dropped", "Lifecycle", "Reply", "bad_request", "refusal"]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A reply: ``body`` as JSON, as plain text if it is a string, nothing for ``None``; or a stream of events.

    Faults set ``half`` (send only half of the bytes) and ``then_close`` (close the connection afterwards).
    """

    status: int = 200
    body: Any = None
    stream: Iterator[dict[str, Any]] | None = None
    half: bool = False
    then_close: bool = False

    def payload(self) -> bytes:
        """The body of a reply that is not a stream, as bytes."""
        if self.body is None:
            return b""
        if isinstance(self.body, str):
            return self.body.encode()
        return json.dumps(self.body, ensure_ascii=False, separators=(",", ":")).encode()


class BadRequest(Exception):
    """The server refuses the request with ``reply``."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.body)
        self.reply = reply


def bad_request(message: str) -> BadRequest:
    """A refusal with status 400, in SGLang's form for ``/generate``."""
    return BadRequest(Reply(status=400, body={"error": {"message": message}}))


class Dropped(Exception):
    """The server closes the connection without a reply."""


def refusal(message: str, status: int = 400) -> Reply:
    """A refusal in SGLang's form for control calls."""
    return Reply(status=status, body={"success": False, "message": message})


class Lifecycle:
    """Whether a server runs, has ended (:attr:`stopped`) or hangs (:attr:`frozen`).

    Args:
        on_death: called by :meth:`die` to break every connection; with ``None`` the process exits instead.
    """

    def __init__(self, on_death: Callable[[], None] | None) -> None:
        self.stopped = threading.Event()
        self.frozen = threading.Event()
        self._on_death = on_death

    def die(self, why: str, exit_code: int = 1) -> None:
        """End the server at once, without a reply to any client.

        Raises:
            ServerStopped: always, in the in-process variant.
        """
        sys.stderr.write(f"fake SGLang server dies: {why}\n")
        sys.stderr.flush()
        if self._on_death is None:
            os._exit(exit_code)
        self.stopped.set()
        self._on_death()
        raise ServerStopped

    def hang(self) -> None:
        """Wait until the server ends.

        Raises:
            ServerStopped: always.
        """
        self.stopped.wait()
        raise ServerStopped

    def sleep(self, seconds: float) -> None:
        """Wait for ``seconds``.

        Raises:
            ServerStopped: the server ended while waiting.
        """
        if self.stopped.wait(seconds):
            raise ServerStopped


@dataclass(kw_only=True)
class Call:
    """One request.

    Attributes:
        method: HTTP method.
        path: path without the query.
        query: query parameters, the last value of each.
        body: parsed JSON; ``None`` when there was no body.
        faults: the armed faults that apply to this request.
        connected: whether the client is still connected.
        lifecycle: whether the server runs.
    """

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    body: Any = None
    faults: tuple[Fault, ...] = ()
    connected: Callable[[], bool] = lambda: True
    lifecycle: Lifecycle

    def reach(self, point: FaultPoint) -> None:
        """Apply the faults for ``point``; called when the request has reached it.

        Raises:
            BadRequest: the request is refused.
            Dropped: the connection must be closed.
            ServerStopped: the server ended.
        """
        for fault in self.faults:
            if fault.at != point:
                continue
            if fault.action == "refuse":
                raise BadRequest(refusal(fault.message, fault.status))
            if fault.action == "drop":
                raise Dropped
            if fault.action == "slow":
                self.lifecycle.sleep(fault.seconds)
            elif fault.action == "die":
                self.lifecycle.die(f"{self.path} at {point!r}", fault.exit_code)
            elif fault.action == "freeze":
                self.lifecycle.frozen.set()
            elif fault.action == "hang":
                self.lifecycle.hang()
        if self.lifecycle.frozen.is_set():
            self.lifecycle.hang()

    def has_fault(self, action: str) -> bool:
        """Whether a fault with this action applies to this request."""
        return any(fault.action == action for fault in self.faults)

    def value(self, name: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        """One field of the JSON body, with its type checked.

        Raises:
            BadRequest: the field is missing and has no default, or has another type.
        """
        if not isinstance(self.body, Mapping):
            raise BadRequest(_invalid("Field required", ("body",)))
        if self.body.get(name) is None:
            if default is ...:
                raise BadRequest(_invalid("Field required", ("body", name)))
            return default
        value = self.body[name]
        if not isinstance(value, kind):
            raise BadRequest(_invalid(f"Input should be a valid {kind}, got {value!r}", ("body", name)))
        return value


def _invalid(message: str, where: tuple[str, ...]) -> Reply:
    text = f"1 validation error:\n  {{'loc': {where}, 'msg': '{message}'}}"
    return Reply(
        status=400, body={"object": "error", "message": text, "type": "Bad Request", "param": None, "code": 400}
    )
