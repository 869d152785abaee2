"""SGLang before 0.5.21, which has no weight-update session: the fake server and a real 0.5.20.

tests/loop/test_old_server.py tests the package's weight sync on such a server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests
import torch

from tests.contract.kit import NORM, PROMPT, LongRequest, Subject, Trainer, weights_of
from tests.fake_sglang import FakeServerProcess, FakeSettings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(480)]  # a start takes minutes on a busy machine

VERSION = "0.5.20"
UPDATED = {"success": True, "message": "Succeeded to update parameter online."}
PARTIALLY_UPDATED = "The full weights of the ModelRunner are partially updated. Please discard the whole weights."


@pytest.fixture(params=["fake", "real"])
def start_old(request: pytest.FixtureRequest, tiny_llama: Path) -> Iterator[Callable[[], Subject]]:
    """``start_old()``: a 0.5.20 server for one test."""
    fakes: list[FakeServerProcess] = []

    def start() -> Subject:
        if request.param == "real":
            environment = request.getfixturevalue("old_sglang_env")
            return Subject(request.getfixturevalue("launch_server")(env=environment).url, "real", tiny_llama)
        fakes.append(FakeServerProcess(FakeSettings(model_path=tiny_llama, version=VERSION)).start())
        return Subject(fakes[-1].url, "fake", tiny_llama)

    yield start
    for fake in fakes:
        fake.kill()


def test_the_contract_before_0_5_21(start_old: Callable[[], Subject], tiny_llama_b: Path) -> None:
    """All checks that do not end the server in one test, because a server takes long to start."""
    subject = start_old()
    assert subject.get("/server_info").json()["version"] == VERSION

    # No session; two endpoints report the load.
    assert [subject.post(path).status_code for path in ("/begin_weight_update", "/end_weight_update")] == [404, 404]
    assert subject.get("/get_load").json()[0].keys() >= {"dp_rank", "num_reqs", "num_waiting_reqs", "num_tokens"}
    assert subject.get("/v1/loads").json()["loads"][0]["num_running_reqs"] == 0
    assert subject.get("/ready").status_code == 200

    # Updates need no session; replies have spans by version.
    before = subject.generate(tokens=8)["output_ids"]
    trainer = Trainer(subject)
    for flattened in (True, False):
        reply = trainer.update(weights_of(tiny_llama_b), flattened=flattened, weight_version=f"b{flattened}")
        assert reply.json()["message"] == f"{UPDATED['message']} Weight version updated to b{flattened}."
    after = subject.generate(tokens=8)
    assert after["output_ids"] != before
    assert after["meta_info"]["weight_versions"] == [{"version": "bFalse", "start": 0, "end": 8}]

    # A bucket is checked only after it was received, so the trainer must broadcast it.
    bad = {"a": torch.ones(3, dtype=torch.bfloat16), NORM: torch.ones(64)}
    announced = trainer.announce(bad)
    assert not announced.is_done(1)
    trainer.broadcast(bad)
    message = announced.result().json()["message"]
    assert message.startswith("Failed to update parameter online: self.storage_offset() must be divisible by 4")
    assert message.endswith(PARTIALLY_UPDATED)
    assert trainer.update({NORM: torch.ones(3)}).json()["message"].endswith(PARTIALLY_UPDATED)
    assert trainer.update({NORM: torch.ones(64)}).json() == UPDATED
    trainer.leave()

    # An unknown sampling parameter.
    reply = subject.post("/generate", input_ids=PROMPT, sampling_params={"tempratur": 1})
    assert (reply.status_code, reply.text) == (500, "Internal Server Error")

    # A retracted request prevents a flush, unlike from 0.5.21 on.
    request = LongRequest(subject).running()
    subject.post("/pause_generation", mode="retract")
    flush = subject.post("/flush_cache")
    assert (flush.status_code, flush.text) == (400, "Flush cache failed.\n")
    subject.post("/update_weight_version", new_version="c", abort_all_requests=False)
    subject.post("/continue_generation")
    request.running(3)
    request.stop()
    assert [span["version"] for span in request.end()["meta_info"]["weight_versions"]] == ["bFalse", "c"]

    # During an abort pause a flush is allowed.
    subject.post("/pause_generation", mode="abort")
    assert subject.post("/flush_cache").status_code == 200
    assert subject.get("/ready").status_code == 503
    subject.post("/continue_generation")


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_refused_flush_after_an_update_ends_the_server(start_old: Callable[[], Subject], mode: str) -> None:
    subject = start_old()
    trainer = Trainer(subject)
    LongRequest(subject).running()
    subject.post("/pause_generation", mode=mode)
    assert trainer.update({NORM: torch.ones(64)}, flush_cache=False).json() == UPDATED
    with pytest.raises(requests.ConnectionError):
        trainer.update({NORM: torch.ones(64)}, flush_cache=True)


def test_an_update_over_an_unknown_group_ends_the_server(start_old: Callable[[], Subject]) -> None:
    subject = start_old()
    with pytest.raises(requests.ConnectionError):
        subject.post("/update_weights_from_distributed", names=[], dtypes=[], shapes=[], group_name="nobody")
