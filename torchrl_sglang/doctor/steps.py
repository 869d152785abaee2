"""One step of the self-test: its result becomes a line of the table."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from torchrl_sglang.doctor.checks import Check, Diagnosis
from torchrl_sglang.errors import SGLangError

__all__ = ["StepFailed", "step"]


class StepFailed(Exception):
    """A step failed, and the next steps depend on it."""


@contextmanager
def step(diagnosis: Diagnosis, name: str, next_step: str) -> Iterator[dict[str, str]]:
    """Add the result of a step; the block may set ``detail``, which is shown in place of the duration."""
    found: dict[str, str] = {"detail": ""}
    start = time.monotonic()
    try:
        yield found
    except (SGLangError, AssertionError) as error:
        diagnosis.add(Check(name=name, status="fail", detail=str(error), next_step=next_step))
        raise StepFailed from error
    detail = found["detail"] or f"{time.monotonic() - start:.1f} s"
    diagnosis.add(Check(name=name, status="pass", detail=detail))
