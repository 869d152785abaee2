"""Results of checks, as records, a table and JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

__all__ = ["Check", "Diagnosis", "Status"]

Status = Literal["pass", "warn", "fail", "skip"]

_MARKS: dict[Status, str] = {"pass": "ok", "warn": "warn", "fail": "FAIL", "skip": "-"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """The result of one check.

    Attributes:
        name: what was checked, in a few words.
        status: ``"pass"``, ``"warn"`` (works, but read the next step), ``"fail"`` or ``"skip"`` (not possible here).
        detail: what was found.
        next_step: what to do about it; empty for nothing.
    """

    name: str
    status: Status
    detail: str
    next_step: str = ""


@dataclass(slots=True, kw_only=True)
class Diagnosis:
    """The results of all checks, with the measured figures.

    Attributes:
        checks: in the order in which they ran.
        figures: measured values by name; the unit is part of the name.

    Examples:
        >>> diagnosis = Diagnosis()
        >>> diagnosis.add(Check(name="gpu", status="skip", detail="none visible"))
        >>> diagnosis.ok
        True
    """

    checks: list[Check] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def add(self, *checks: Check) -> None:
        """Add results."""
        self.checks.extend(checks)

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return all(check.status != "fail" for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """As plain values: ``ok``, ``checks``, ``figures``."""
        return {"ok": self.ok, "checks": [asdict(check) for check in self.checks], "figures": dict(self.figures)}

    def table(self, *, width: int = 100) -> str:
        """As text: one row per check, and below it the next step, if there is one."""
        name_width = max((len(check.name) for check in self.checks), default=0)
        lines: list[str] = []
        for check in self.checks:
            head = f"{_MARKS[check.status]:>4}  {check.name:<{name_width}}  "
            lines += _hanging(head, check.detail, width)
            if check.next_step:
                lines += _hanging(" " * len(head) + "-> ", check.next_step, width)
        return "\n".join(lines)


def _hanging(head: str, text: str, width: int) -> Sequence[str]:
    return textwrap.wrap(
        text or " ",
        width=max(width, len(head) + 30),
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        drop_whitespace=True,
    ) or [head]
