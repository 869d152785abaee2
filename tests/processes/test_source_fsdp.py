"""FSDP2 over gloo: two ranks gather in the same order, and rank 0 sends the whole model.

Both ranks run all scenarios of ``sharded_trainer.py`` once; each test checks the results of some of them.
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

from tests.fake_sglang import FakeServer, FakeSettings

pytest.importorskip("peft")

WORLD_SIZE = 2
SCRIPT = Path(__file__).with_name("sharded_trainer.py")
Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Results by rank and scenario."""
    folder = tmp_path_factory.mktemp("sharded")
    for name, settings in {"qwen2": {}, "tied": {"arch": "llama", "tied": True}, "moe": {"arch": "qwen3_moe"}}.items():
        (folder / name).symlink_to(make_model(**{"arch": "qwen2", **settings}))
    logs = [folder / f"rank{rank}.log" for rank in range(WORLD_SIZE)]
    processes = []
    server = FakeServer(FakeSettings(model_path=folder / "qwen2")).start()
    (folder / "url").write_text(server.url)
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
        server.stop()
    tails = "\n".join(f"--- rank {rank}\n{log.read_text()[-4000:]}" for rank, log in enumerate(logs))
    assert codes == [0] * WORLD_SIZE, f"exit codes {codes} (None: still running, so a rank hung)\n{tails}"
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize(
    "scenario", ["plain", "tied", "hybrid_mesh", "compiled_and_wrapped", "tensordict", "moe", "adapters"]
)
def test_every_rank_gathers_the_whole_model_and_the_first_one_sends(ranks: Results, scenario: str) -> None:
    assert [rank[scenario]["is_sender"] for rank in ranks] == [True] + [False] * (WORLD_SIZE - 1)
    expected = ranks[0][scenario]["expected"]
    for rank in ranks:
        sent = rank[scenario]["sent"]
        assert sent
        assert list(sent) == list(ranks[0][scenario]["sent"]), "ranks that gather in different orders deadlock"
        for name, tensor in sent.items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    # Only a tied output embedding may be absent.
    assert expected.keys() - ranks[0][scenario]["sent"].keys() <= {"lm_head.weight"}


def test_adapted_weights_count_as_trainable_although_their_base_is_frozen(ranks: Results) -> None:
    trainable = ranks[0]["adapters"]["trainable"]
    assert len(trainable) == 4
    assert all(name.endswith(("q_proj.weight", "down_proj.weight")) for name in trainable)


def test_every_rank_refuses_to_send_a_sharded_adapter_alone(ranks: Results) -> None:
    assert all("transport='broadcast' gathers it" in rank["adapters"]["refusal"] for rank in ranks)


def test_chosen_names_come_in_the_requested_order_on_all_ranks(ranks: Results) -> None:
    for rank in ranks:
        sent, expected = rank["chosen_names"]["sent"], rank["chosen_names"]["expected"]
        assert list(sent) == list(expected)
        assert all(torch.equal(sent[name], expected[name]) for name in expected)


def test_a_sender_that_stops_early_does_not_block_the_other_ranks(ranks: Results) -> None:
    counts = [rank["stopped_early"]["count"] for rank in ranks]
    assert counts == [3] + [ranks[0]["stopped_early"]["total"]] * (WORLD_SIZE - 1)


def test_infinity_in_one_ranks_shard_is_refused_by_all_ranks_by_name(ranks: Results) -> None:
    for rank in ranks:
        (line,) = rank["infinity_on_the_last_rank"]["refused"]
        assert line.startswith("model.layers.1.mlp.up_proj.weight: ")
    assert "another rank" in ranks[0]["infinity_on_the_last_rank"]["refused"][0]
    assert "1 of " in ranks[-1]["infinity_on_the_last_rank"]["refused"][0]


def test_an_error_of_one_rank_reaches_all_before_they_gather(ranks: Results) -> None:
    """Else the others wait in a gather until the time-out of the trainer's own group."""
    first, last = (rank["failing_ranks"] for rank in ranks)
    for case, message in {
        "the last one reaches no server": "ServerUnreachableError: nothing accepts connections at http://127.0.0.1:9",
        "the first one reaches no server": "ServerUnreachableError: nothing accepts connections at http://127.0.0.1:9",
        "the last one has another name_map": "ConfigError: name_map names tensors that the weights don't have",
        "the first one can't listen": "ConfigError: can't listen on 203.0.113.7",
    }.items():
        assert first[case].startswith(message), first[case]
        assert last[case] == first[case]
    foreign = (
        "WeightUpdateError: rank {} failed while reaching the servers and opening its weights: {}. Nothing was sent"
    )
    assert last["the last one meets a KeyError"] == "KeyError: 'q_proj'"
    assert first["the last one meets a KeyError"] == foreign.format(1, "KeyError: 'q_proj'")
    assert last["the first one meets a KeyError"] == foreign.format(0, "KeyError: 'q_proj'")
    assert last["the last one is interrupted"].startswith("KeyboardInterrupt")
    assert first["the last one is interrupted"] == foreign.format(1, "KeyboardInterrupt: ")


def test_a_sender_that_fails_before_it_packs_anything_leaves_nobody_gathering(ranks: Results) -> None:
    first, last = (rank["failing_ranks"] for rank in ranks)
    assert "no_folder0" in first["the first one can't write"]
    assert "Error: " in first["the first one can't write"]
    assert (first["nothing"], last["nothing"]) == ("sent", "nothing to send")


def test_a_model_that_a_forward_pass_has_left_whole_counts_as_sharded(ranks: Results) -> None:
    """Else a rank that fails would leave the others waiting in the first gather."""
    assert [rank["root_alone"] for rank in ranks] == [{"was_whole": True, "has_ranks": True}] * WORLD_SIZE


def test_sharded_weights_of_any_form_are_not_gathered_beside_the_training(ranks: Results) -> None:
    for rank in ranks:
        for case in ("a model in the background", "tensors in the background"):
            assert rank["failing_ranks"][case].startswith("sharded weights can't be sent in the background"), case
