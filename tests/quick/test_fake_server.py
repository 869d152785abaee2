"""The parts of the fake server that a real server does not have: several ranks, recorded requests, the fake model.

What it has in common with a real server is tested in tests/contract, on both.
"""

from __future__ import annotations

import base64
import contextlib
import gc
import json
import math
import pickle
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import torch
from safetensors.torch import save_file

from tests.contract.kit import NORM, PROMPT, Background, LongRequest, Trainer, session, subject_of, weights_of
from tests.fake_sglang import FakeServer, FakeSettings, logprobs, signature
from tests.fake_sglang.model import Weights
from tests.fake_sglang.ranks import Ranks
from tests.fake_sglang.state import ControlState


@pytest.fixture
def old_fake(tiny_llama: Path) -> Iterator[FakeServer]:
    with FakeServer(FakeSettings(model_path=tiny_llama, version="0.5.20")) as server:
        yield server


# ----------------------------------------------------------------------------------------------------- state machine


def test_a_refusal_leaves_the_state_as_it_was() -> None:
    state = ControlState(has_session=True)
    assert not state.end()[0]
    assert not state.may_update("g")[0]
    assert not state.leave("g")[0]
    state.begin()
    assert not state.begin()[0]
    assert state.session_open
    assert "Group g not in []" in state.may_update("g")[1]
    state.joined("g")
    assert state.may_update("g")[0]
    assert not state.may_join("g")[0]
    assert state.end()[0]
    assert not state.may_update("g")[0]


def test_queued_requests_forbid_a_flush_unless_a_newer_server_is_paused() -> None:
    new, old = ControlState(has_session=True), ControlState(has_session=False)
    assert not new.may_flush(running=0, waiting=1)
    new.engine = old.engine = "retract"
    assert new.may_flush(running=0, waiting=1)
    assert not old.may_flush(running=0, waiting=1)
    assert not new.may_flush(running=1, waiting=0)


# ----------------------------------------------------------------------------------------------------------- model


def test_a_test_can_compute_the_log_probs_that_the_fake_server_reports_for_a_trainers_weights(
    fake: FakeServer, tiny_llama_b: Path
) -> None:
    subject = subject_of(fake)
    tokens = [*PROMPT, 9, 8, 7]
    config = json.loads((subject.model / "config.json").read_text())
    for model in (subject.model, tiny_llama_b):
        subject.post("/update_weights_from_disk", model_path=str(model))
        expected = logprobs(signature(weights_of(model)), tokens, config["vocab_size"])
        assert subject.logprobs(tokens) == expected[1:]


def test_greedy_takes_the_likeliest_token_and_sampling_follows_the_probabilities(fake: FakeServer) -> None:
    subject = subject_of(fake)
    reply = subject.generate(tokens=1, return_logprob=True, top_logprobs_num=3)["meta_info"]
    (best, second, _third) = reply["output_top_logprobs"][0]
    assert reply["output_token_logprobs"][0] == best

    sampled = subject.generate([PROMPT] * 400, tokens=1, sampling={"temperature": 0.5, "ignore_eos": True})
    share = sum(r["output_ids"] == [best[1]] for r in sampled) / 400
    only = subject.generate([PROMPT] * 50, tokens=1, sampling={"temperature": 1.0, "top_k": 2})
    assert {r["output_ids"][0] for r in only} <= {best[1], second[1]}
    hot = subject.generate(tokens=1, sampling={"temperature": 0.5}, return_logprob=True)["meta_info"]
    assert 0.2 < share < 0.99
    assert math.exp(hot["output_token_logprobs"][0][0]) < 1


def test_stop_strings_end_a_sequence_and_are_cut_off(fake: FakeServer) -> None:
    subject = subject_of(fake)
    free = subject.generate(tokens=30)["text"]
    stop = free[5:7]
    reply = subject.generate(tokens=30, sampling={"stop": [stop]})
    assert reply["text"] == free[: free.index(stop)]
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


def test_a_checkpoint_without_text_is_enough(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 32, "eos_token_id": 5}))
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    with FakeServer(FakeSettings(model_path=tmp_path)) as server:
        reply = subject_of(server).generate([1, 2], tokens=2)
    assert reply["text"] == "".join(f"<{i}>" for i in reply["output_ids"])


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 32}))
    with pytest.raises(FileNotFoundError, match="safetensors"):
        FakeServer(FakeSettings(model_path=tmp_path))


# ----------------------------------------------------------------------------------------------------- several ranks


def test_every_rank_receives_every_tensor(tiny_llama: Path, tiny_llama_b: Path) -> None:
    new = weights_of(tiny_llama_b)
    with FakeServer(FakeSettings(model_path=tiny_llama, tp_size=3)) as server:
        subject = subject_of(server)
        trainer = Trainer(subject, tp_size=3)
        with session(subject):
            assert trainer.update(new).status_code == 200
            assert trainer.update({NORM: new[NORM] * 2}, flattened=False).status_code == 200
        held = server.weights
        trainer.leave()
    assert len(held) == 3
    for rank in held:
        assert rank.keys() == new.keys()
        for name, tensor in rank.items():
            torch.testing.assert_close(tensor, new[name] * 2 if name == NORM else new[name], rtol=0, atol=0)


def test_a_failed_collective_is_freed_without_a_garbage_collection() -> None:
    """Otherwise the sockets of its group stay open, and the trainer does not notice that the rank has failed."""

    class Collective:
        pass

    collectives = []

    def fail(rank: int) -> None:
        collective = Collective()
        collectives.append(weakref.ref(collective))
        raise RuntimeError("connection lost")

    gc.disable()
    try:
        with contextlib.suppress(RuntimeError):
            Ranks([Weights({})], timeout_s=1)._on_each_rank(fail)
        assert [collective() for collective in collectives] == [None]
    finally:
        gc.enable()


def test_checksums_come_per_rank(tiny_llama: Path) -> None:
    with FakeServer(FakeSettings(model_path=tiny_llama, tp_size=2)) as server:
        reply = subject_of(server).post("/weights_checker", action="checksum").json()
    assert [rank["parallelism_info"][0]["tp_rank"] for rank in reply["ranks"]] == [0, 1]
    first, second = (rank["checksums"] for rank in reply["ranks"])
    assert first.keys() == second.keys()
    different = {name for name in first if first[name] != second[name]}
    assert different == {name for name in first if "norm" not in name}


# ------------------------------------------------------------------------------------------- what tests read and set


def test_every_request_is_recorded_in_order_with_its_body_and_status(fake: FakeServer) -> None:
    subject = subject_of(fake)
    subject.post("/begin_weight_update")
    subject.post("/begin_weight_update", selector="all")
    subject.get("/ready")

    seen = [(e["seq"], e["method"], e["path"], e["body"], e["status"]) for e in fake.events]
    assert seen == [
        (0, "POST", "/begin_weight_update", {}, 200),
        (1, "POST", "/begin_weight_update", {"selector": "all"}, 400),
        (2, "GET", "/ready", None, 200),
    ]
    assert requests.get(fake.url + "/fake/events", timeout=5).json() == fake.events
    requests.delete(fake.url + "/fake/events", timeout=5)
    assert fake.events == []


def test_a_session_that_another_trainer_left_open_can_be_simulated(fake: FakeServer) -> None:
    fake.set_state(session_open=True, weight_version="dirty-5@other")
    subject = subject_of(fake)
    assert subject.version() == "dirty-5@other"
    assert subject.generate()["meta_info"]["weight_version"] == "dirty-5@other"
    assert subject.post("/begin_weight_update").status_code == 400
    assert subject.post("/end_weight_update").status_code == 200


def test_adapters_change_the_replies_and_are_selected_by_name(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"any bytes")
    tensors = base64.b64encode(pickle.dumps("other bytes")).decode()
    with FakeServer(FakeSettings(model_path=tiny_llama, enable_lora=True)) as server:
        subject = subject_of(server)
        load = {"lora_name": "a", "config_dict": {}, "serialized_named_tensors": [tensors]}
        assert subject.post("/load_lora_adapter_from_tensors", **load).json()["loaded_adapters"] == {"a": "__tensor__"}
        assert "already loaded" in subject.post("/load_lora_adapter_from_tensors", **load).json()["error_message"]
        assert subject.post("/load_lora_adapter", lora_name="b", lora_path=str(tmp_path)).json()["success"]
        assert not subject.post("/load_lora_adapter", lora_name="c", lora_path="/no/such/folder").json()["success"]

        replies = [r["output_ids"] for r in subject.generate([PROMPT] * 3, tokens=8, lora_path=["a", "b", None])]
        assert len({tuple(ids) for ids in replies}) == 3
        assert replies[2] == subject.generate(tokens=8)["output_ids"]
        unknown = subject.post("/generate", input_ids=PROMPT, lora_path="z")
        assert (unknown.status_code, "has never been loaded: z" in unknown.json()["error"]["message"]) == (400, True)

        for name in ("a", "b"):
            assert subject.post("/unload_lora_adapter", lora_name=name).status_code == 200
        assert subject.post("/unload_lora_adapter", lora_name="a").status_code == 400
        assert subject.generate(tokens=8, lora_path="b")["output_ids"] == replies[1], "not loaded again from disk"
        assert subject.post("/generate", input_ids=PROMPT, lora_path="a").status_code == 400


def test_generating_health_is_503_while_paused_and_ready_until_the_next_health_check(
    tiny_llama: Path,
) -> None:
    settings = FakeSettings(model_path=tiny_llama, health_generates=True, health_timeout_s=0.3)
    with FakeServer(settings) as server:
        subject = subject_of(server)
        assert subject.get("/health").status_code == 200
        subject.post("/pause_generation")
        assert subject.get("/health").status_code == 503
        subject.post("/continue_generation")
        assert subject.get("/ready").status_code == 503
        assert subject.get("/health").status_code == 200
        assert subject.get("/ready").status_code == 200


def test_a_client_that_disconnects_ends_its_request(fake: FakeServer) -> None:
    subject = subject_of(fake)
    with pytest.raises(requests.Timeout):
        subject.post(
            "/generate",
            timeout_s=0.3,
            input_ids=PROMPT,
            sampling_params={"max_new_tokens": 2000, "ignore_eos": True},
        )
    flush = Background(lambda: subject.post("/flush_cache?timeout=20"))
    assert flush.result().status_code == 200
    assert subject.get("/v1/loads").json()["loads"][0]["num_running_reqs"] == 0


# -------------------------------------------------------------------------------------------------------- up to 0.5.20


def test_before_0_5_21_an_update_needs_no_session(old_fake: FakeServer) -> None:
    subject = subject_of(old_fake)
    assert subject.post("/begin_weight_update").status_code == 404
    assert subject.post("/end_weight_update").status_code == 404
    assert requests.get(old_fake.url + "/get_load", timeout=5).json()[0]["num_reqs"] == 0
    trainer = Trainer(subject)
    assert trainer.update({NORM: torch.full((64,), 2.0)}, weight_version="3").status_code == 200
    assert subject.version() == "3"
    trainer.leave()


def test_before_0_5_21_a_retracted_request_forbids_a_flush(old_fake: FakeServer) -> None:
    subject = subject_of(old_fake)
    request = LongRequest(subject).running()
    subject.post("/pause_generation", mode="retract")
    assert subject.post("/flush_cache").status_code == 400
    subject.post("/continue_generation")
    request.stop()


def test_before_0_5_21_an_unknown_sampling_parameter_is_a_bare_500(old_fake: FakeServer) -> None:
    reply = subject_of(old_fake).post("/generate", input_ids=PROMPT, sampling_params={"tempratur": 1})
    assert (reply.status_code, reply.text) == (500, "Internal Server Error")


def test_before_0_5_21_an_unaligned_bucket_is_received_and_fails_when_it_is_split(old_fake: FakeServer) -> None:
    trainer = Trainer(subject_of(old_fake))
    bucket = {"a": torch.ones(3, dtype=torch.bfloat16), NORM: torch.ones(64)}
    announced = trainer.announce(bucket)
    assert not announced.is_done(0.3)
    trainer.broadcast(bucket)
    assert "must be divisible by 4" in announced.result().json()["message"]
    trainer.leave()
