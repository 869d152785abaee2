"""Faults on demand: each is a record that is matched against requests by path and number."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

__all__ = ["Fault", "FaultAction", "FaultPoint", "FaultRegistry"]

FaultPoint = Literal["arrived", "scheduled", "joined", "received", "handled", "replied"]
"""The point in a request's processing at which a fault takes effect.

``arrived``: the request was read, nothing else was done. ``scheduled``: the scheduler runs it (and nothing else).
``joined``: in a weight update, each rank has entered the collective. ``received``: the bytes have arrived, nothing is
loaded. ``handled``: everything is done, no reply was sent. ``replied``: the reply was sent.
"""

FaultAction = Literal["refuse", "slow", "hang", "die", "freeze", "drop", "half_reply", "close", "no_communicator"]
"""What a fault does.

``refuse``: answer ``status`` with ``message``. ``slow``: wait ``seconds``, then continue. ``hang``: never continue
(this request only; from ``scheduled`` to ``received`` the scheduler hangs too). ``die``: the server ends, as a separate
process by ``os._exit(exit_code)``. ``freeze``: the whole server stops answering, connections stay open. ``drop``: close
the connection without a reply. ``half_reply``: send the headers and half of the body, then close. ``close``:
reply in full, then close the connection without announcing that. ``no_communicator``: answer that the group was
formed, without forming it.
"""

_REPLY_ONLY = {"half_reply": "handled", "close": "replied"}
_SCHEDULER_POINTS = ("scheduled", "joined", "received")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault. It applies to ``times`` requests to ``path``, beginning with the ``nth`` since it was armed.

    Attributes:
        path: the request path, a shell pattern such as ``"/update_*"`` or ``"*"``.
        action: what happens, see :data:`FaultAction`.
        at: when it takes effect, see :data:`FaultPoint`; ``half_reply`` and ``close`` have fixed points.
        nth: the first matching request it applies to, from 1.
        times: how many requests in a row it applies to; 0 for all.
        status: HTTP status of a refusal.
        message: message of a refusal.
        seconds: how long ``slow`` waits.
        exit_code: exit code of a process that dies.

    Examples:
        >>> Fault(path="/begin_weight_update", action="refuse", message="no").status
        400
        >>> Fault(path="/generate", action="explode")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: action must be one of refuse, slow, hang, die, freeze, drop, half_reply, close, ..., not 'explode'
    """

    path: str
    action: FaultAction
    at: FaultPoint = "arrived"
    nth: int = 1
    times: int = 1
    status: int = 400
    message: str = "refused by the fake server"
    seconds: float = 0.0
    exit_code: int = 1

    def __post_init__(self) -> None:
        if self.action not in get_args(FaultAction):
            raise ValueError(f"action must be one of {', '.join(get_args(FaultAction))}, not {self.action!r}")
        if self.at not in get_args(FaultPoint):
            raise ValueError(f"at must be one of {', '.join(get_args(FaultPoint))}, not {self.at!r}")
        if self.nth < 1 or self.times < 0:
            raise ValueError(f"nth starts at 1 and times at 0, not {self.nth} and {self.times}")
        object.__setattr__(self, "at", _REPLY_ONLY.get(self.action, self.at))
        if self.action == "no_communicator":
            object.__setattr__(self, "at", "scheduled")
        if self.action in ("drop", "refuse") and self.at == "replied":
            raise ValueError(f"{self.action!r} comes too late at 'replied': the reply was sent")
        if self.action == "drop" and self.at in _SCHEDULER_POINTS:
            raise ValueError("'drop' is done at the connection: use at='arrived' or at='handled'")

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Fault:
        """Build a fault from a JSON object; unknown keys raise :class:`ValueError`."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(record) - known)
        if unknown:
            raise ValueError(f"a fault has no {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        return cls(**record)

    def to_json(self) -> dict[str, Any]:
        """The fault as a JSON object, see :meth:`from_json`."""
        return asdict(self)


class FaultRegistry:
    """The armed faults, and how many matching requests each has seen; thread-safe."""

    def __init__(self, faults: tuple[Fault, ...] = ()) -> None:
        self._lock = threading.Lock()
        self._seen: list[tuple[Fault, int]] = [(fault, 0) for fault in faults]

    def arm(self, *faults: Fault) -> None:
        """Add faults; each counts requests from now on."""
        with self._lock:
            self._seen += [(fault, 0) for fault in faults]

    def clear(self) -> None:
        """Disarm everything. A fault that has already taken effect continues."""
        with self._lock:
            self._seen.clear()

    def armed(self) -> list[Fault]:
        """The armed faults, in order; including those that no longer apply."""
        with self._lock:
            return [fault for fault, _ in self._seen]

    def match(self, path: str) -> tuple[Fault, ...]:
        """Count one request to ``path`` and return the faults that apply to it."""
        matching = []
        with self._lock:
            for i, (fault, seen) in enumerate(self._seen):
                if not fnmatchcase(path, fault.path):
                    continue
                self._seen[i] = (fault, seen + 1)
                if seen + 1 >= fault.nth and (fault.times == 0 or seen + 1 < fault.nth + fault.times):
                    matching.append(fault)
        return tuple(matching)
