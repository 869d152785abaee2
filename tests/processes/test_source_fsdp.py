"""FSDP2 over gloo: two ranks gather in step, rank 0 sends, and what it sends is the whole model.

Both ranks run ``sharded_trainer.py`` once, all scenarios; each test looks at one of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

WORLD_SIZE = 2
SCRIPT = Path(__file__).with_name("sharded_trainer.py")
Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each rank saw, by scenario."""
    folder = tmp_path_factory.mktemp("sharded")
    for name, settings in {"qwen2": {}, "tied": {"arch": "llama", "tied": True}, "moe": {"arch": "qwen3_moe"}}.items():
        (folder / name).symlink_to(make_model(**{"arch": "qwen2", **settings}))
    logs = [folder / f"rank{rank}.log" for rank in range(WORLD_SIZE)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as stream:
                command = [sys.executable, str(SCRIPT), str(rank), str(WORLD_SIZE), str(folder)]
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                processes.append(subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment))
        deadline = time.monotonic() + 200  # imports and ten small models, also on a busy machine
        codes = [process.wait(timeout=max(0, deadline - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    tails = "\n".join(f"--- rank {rank}\n{log.read_text()[-4000:]}" for rank, log in enumerate(logs))
    assert codes == [0] * WORLD_SIZE, f"exit codes {codes} (None: still running, so a rank hung)\n{tails}"
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize(
    "scenario", ["plain", "tied", "hybrid_mesh", "compiled_and_wrapped", "tensordict", "moe", "adapters"]
)
def test_every_rank_gathers_the_whole_model_and_the_first_one_sends(ranks: Results, scenario: str) -> None:
    assert [rank[scenario]["is_sender"] for rank in ranks] == [True] + [False] * (WORLD_SIZE - 1)
    wanted = ranks[0][scenario]["wanted"]
    for rank in ranks:
        sent = rank[scenario]["sent"]
        assert sent
        assert list(sent) == list(ranks[0][scenario]["sent"]), "ranks that gather in different orders wait for ever"
        for name, tensor in sent.items():
            torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=0)
    # Nothing besides what the checkpoint has under another name.
    assert wanted.keys() - ranks[0][scenario]["sent"].keys() <= {"lm_head.weight"}


def test_adapters_count_as_trainable_though_the_base_is_frozen(ranks: Results) -> None:
    trainable = ranks[0]["adapters"]["trainable"]
    assert len(trainable) == 4
    assert all(name.endswith(("q_proj.weight", "down_proj.weight")) for name in trainable)


def test_a_sharded_adapter_is_not_sent_alone_and_every_rank_says_so(ranks: Results) -> None:
    assert all("transport='broadcast' gathers it" in rank["adapters"]["alone"] for rank in ranks)


def test_chosen_names_come_in_the_order_asked_for_on_all_ranks(ranks: Results) -> None:
    for rank in ranks:
        sent, wanted = rank["chosen_names"]["sent"], rank["chosen_names"]["wanted"]
        assert list(sent) == list(wanted)
        assert all(torch.equal(sent[name], wanted[name]) for name in wanted)


def test_a_sender_that_gives_up_does_not_leave_the_others_waiting(ranks: Results) -> None:
    counts = [rank["closed_early"]["count"] for rank in ranks]
    assert counts == [3] + [ranks[0]["closed_early"]["total"]] * (WORLD_SIZE - 1)


def test_infinity_in_one_ranks_shard_is_refused_by_all_of_them_by_name(ranks: Results) -> None:
    for rank in ranks:
        (line,) = rank["nan_on_the_last_rank"]["refused"]
        assert line.startswith("model.layers.1.mlp.up_proj.weight: ")
    assert "another rank" in ranks[0]["nan_on_the_last_rank"]["refused"][0]
    assert "1 of " in ranks[-1]["nan_on_the_last_rank"]["refused"][0]
