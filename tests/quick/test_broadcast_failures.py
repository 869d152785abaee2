"""A broadcast whose work has failed is a failed broadcast, although torch calls the work completed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torchrl_sglang import WeightUpdateError
from torchrl_sglang.weights.group.process_group import WeightGroup


class Work:
    """NCCL's handle: ``is_completed`` is true after an exception, too."""

    def __init__(self, polls: int, error: BaseException | None) -> None:
        self._polls = polls
        self._error = error

    def is_completed(self) -> bool:
        self._polls -= 1
        return self._polls < 0

    def exception(self) -> BaseException | None:
        return self._error if self._polls < 0 else None


class Group:
    def __init__(self, work: Work) -> None:
        self._work = work

    def broadcast(self, tensors: list[torch.Tensor], options: Any) -> Work:
        return self._work

    def abort(self) -> None:
        raise AssertionError("nothing took too long")


@pytest.mark.parametrize("polls", [0, 3])
def test_a_work_that_completed_with_an_exception_did_not_send_the_bytes(polls: int) -> None:
    work = Work(polls, RuntimeError("NCCL communicator was aborted on rank 2"))
    group = WeightGroup("g", [], "nccl", 3, Group(work))
    with pytest.raises(WeightUpdateError, match="broadcast failed: NCCL communicator was aborted on rank 2"):
        group.broadcast(torch.zeros(4), timeout_s=20)


@pytest.mark.parametrize("polls", [0, 3])
def test_a_work_that_completed_without_one_did(polls: int) -> None:
    WeightGroup("g", [], "nccl", 3, Group(Work(polls, None))).broadcast(torch.zeros(4), timeout_s=20)
