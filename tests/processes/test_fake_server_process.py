"""The fake server as a process: it ends, is stopped, and does not outlive the process that started it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests
import torch

from tests.contract.kit import NORM, LongRequest, Trainer, subject_of
from tests.fake_sglang import FakeServerProcess, FakeSettings, Fault
from tests.fake_sglang.process import ROOT

UPDATE = "/update_weights_from_distributed"


@pytest.fixture
def process(tiny_llama: Path) -> Iterator[FakeServerProcess]:
    with FakeServerProcess(FakeSettings(model_path=tiny_llama)) as server:
        yield server


def test_a_server_that_dies_in_a_broadcast_breaks_the_trainers_connection(process: FakeServerProcess) -> None:
    subject = subject_of(process)
    trainer = Trainer(subject)
    subject.post("/begin_weight_update")
    process.arm(Fault(path=UPDATE, action="die", at="joined", exit_code=7))
    announced = trainer.announce({NORM: torch.full((64,), 2.0)})
    assert process.wait(30) == 7
    with pytest.raises(RuntimeError, match=r"[Cc]onnection"):
        for _ in range(50):  # a small payload may still fit the kernel's buffers
            trainer.broadcast({NORM: torch.ones(100_000)})
    with pytest.raises(requests.ConnectionError):
        announced.result()


def test_a_suspended_process_continues(process: FakeServerProcess) -> None:
    subject = subject_of(process)
    process.suspend()
    with pytest.raises(requests.Timeout):
        subject.get("/ready", timeout_s=0.5)
    process.resume()
    assert subject.get("/ready").status_code == 200
    assert [event["path"] for event in process.events][-1] == "/ready"
    process.set_state(session_open=True)
    assert subject.post("/end_weight_update").status_code == 200
    process.disarm()


def test_the_process_ends_with_the_process_that_started_it(tiny_llama: Path) -> None:
    program = (
        "import os, sys; from tests.fake_sglang import *;"
        "s = FakeServerProcess(FakeSettings(model_path=sys.argv[1])).start(); print(s.pid, flush=True); os._exit(0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tiny_llama)], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    pid = int(done.stdout)
    deadline = time.monotonic() + 20
    while psutil.pid_exists(pid):
        assert time.monotonic() < deadline, "it outlives the process that started it"
        time.sleep(0.1)


@pytest.mark.parametrize("why", ["unknown group", "refused flush"])
def test_before_0_5_21_some_updates_end_the_server(tiny_llama: Path, why: str) -> None:
    with FakeServerProcess(FakeSettings(model_path=tiny_llama, version="0.5.20")) as server:
        subject = subject_of(server)
        body = {"names": [], "dtypes": [], "shapes": [], "group_name": "nobody"}
        if why == "refused flush":
            LongRequest(subject).running()
            subject.post("/pause_generation", mode="in_place")
            body["group_name"] = Trainer(subject).group
        with pytest.raises(requests.ConnectionError):
            subject.post("/update_weights_from_distributed", **body)
        assert server.wait(10) == 1
