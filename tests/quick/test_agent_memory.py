"""What is left of sessions that were read: nothing; and descriptors that are kept for servers."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path

from tests.agent_runs import two_turns
from tests.fake_sglang import FakeServer, FakeSettings
from torchrl_sglang import AgentCollector, AgentGateway
from torchrl_sglang.agents.conversation.tree import Node
from torchrl_sglang.agents.open_files import RESERVE, DescriptorReserve, is_out_of_files
from torchrl_sglang.agents.session import Session
from torchrl_sglang.agents.types import Trajectory


def alive() -> dict[str, int]:
    gc.collect()
    kinds = (Session, Node, Trajectory)
    found = [type(each) for each in gc.get_objects() if type(each) in kinds]
    return {kind.__name__: found.count(kind) for kind in kinds}


def test_nothing_is_left_of_sessions_whose_batches_were_taken(tiny_llama: Path) -> None:
    before = alive()
    with (
        FakeServer(FakeSettings(model_path=tiny_llama)) as server,
        AgentGateway(server.url) as gateway,
        AgentCollector(
            gateway, two_turns(lambda task: iter([0.0, 1.0, 2.0, 3.0])), range(10), group_size=4, groups_per_batch=2
        ) as collector,
    ):
        frames = sum(len(batch) for batch in collector)
        assert frames == 40
        assert gateway.list_sessions() == []
        assert alive() == before


def test_reserved_descriptors_are_given_up_one_by_one_and_taken_again() -> None:
    reserve = DescriptorReserve(3)
    for _ in range(2):
        reserve.fill()
        reserve.fill()
        assert [reserve.release() for _ in range(4)] == [True, True, True, False]


def test_a_gateway_that_is_closed_reserves_no_descriptors(tiny_llama: Path) -> None:
    def of_nothing() -> int:
        return [os.path.realpath(each) for each in Path("/proc/self/fd").iterdir()].count(os.devnull)

    RESERVE.empty()
    before = of_nothing()
    with FakeServer(FakeSettings(model_path=tiny_llama)) as server:
        with AgentGateway(server.url):
            assert of_nothing() >= before + 32
        assert of_nothing() == before


def test_the_want_of_descriptors_is_found_among_the_causes_of_an_error() -> None:
    error = ConnectionError("no connection")
    error.__cause__ = OSError(errno.EMFILE, "Too many open files")
    assert is_out_of_files(error)
    assert not is_out_of_files(OSError(errno.ENOENT, "no such file"))
    assert not is_out_of_files(None)
