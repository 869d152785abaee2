"""One request on its way through the fake, the reply to it, and where faults strike it."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.fake_sglang.faults import Fault, FaultPoint
from tests.fake_sglang.scheduler import Gone

__all__ = ["BadRequest", "Call", "Dropped", "Lifecycle", "Reply", "refusal"]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What is sent back: JSON for ``body``, plain text for a string, nothing for ``None``, or a stream of events.

    ``half`` and ``then_close`` are what faults do to it.
    """

    status: int = 200
    body: Any = None
    stream: Iterator[dict[str, Any]] | None = None
    half: bool = False
    then_close: bool = False

    def payload(self) -> bytes:
        """The bytes of a reply that is no stream."""
        if self.body is None:
            return b""
        if isinstance(self.body, str):
            return self.body.encode()
        return json.dumps(self.body, ensure_ascii=False, separators=(",", ":")).encode()


class BadRequest(Exception):
    """The request is answered with ``reply`` instead of what was asked."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.body)
        self.reply = reply


class Dropped(Exception):
    """The connection is closed without a reply."""


def refusal(message: str, status: int = 400) -> Reply:
    """A refusal in the form SGLang gives to refused control calls."""
    return Reply(status=status, body={"success": False, "message": message})


class Lifecycle:
    """A server's life: it can end (:attr:`gone`) or freeze.

    Args:
        on_death: called to break every connection; the process variant leaves it out and exits.
    """

    def __init__(self, on_death: Callable[[], None] | None) -> None:
        self.gone = threading.Event()
        self.frozen = threading.Event()
        self._on_death = on_death

    def die(self, why: str, exit_code: int = 1) -> None:
        """End here and now, without a word to anybody.

        Raises:
            Gone: always, in the in-process variant.
        """
        sys.stderr.write(f"fake SGLang server dies: {why}\n")
        sys.stderr.flush()
        if self._on_death is None:
            os._exit(exit_code)
        self.gone.set()
        self._on_death()
        raise Gone

    def hang(self) -> None:
        """Wait until the server is gone.

        Raises:
            Gone: always.
        """
        self.gone.wait()
        raise Gone

    def sleep(self, seconds: float) -> None:
        """Wait.

        Raises:
            Gone: the server ended meanwhile.
        """
        if self.gone.wait(seconds):
            raise Gone


@dataclass(kw_only=True)
class Call:
    """One request.

    Attributes:
        method: HTTP method.
        path: path without the query.
        query: query parameters, the last value of each.
        body: parsed JSON; ``None`` when there was no body.
        strikes: the faults that strike this request.
        connected: whether the client is still there.
        lifecycle: the server's life.
    """

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    body: Any = None
    strikes: tuple[Fault, ...] = ()
    connected: Callable[[], bool] = lambda: True
    lifecycle: Lifecycle

    def reach(self, point: FaultPoint) -> None:
        """Say that the request has come this far; whatever fault waits here strikes.

        Raises:
            BadRequest: the request is refused.
            Dropped: the connection is to be closed.
            Gone: the server ended.
        """
        for fault in self.strikes:
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

    def struck_by(self, action: str) -> bool:
        """Whether a fault with this action strikes this request."""
        return any(fault.action == action for fault in self.strikes)

    def value(self, name: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        """One field of the JSON body, checked.

        Raises:
            BadRequest: it is missing and has no default, or is of another type.
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
