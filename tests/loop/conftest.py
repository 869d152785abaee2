"""Fixtures that several files of ``tests/loop`` use."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.loop.adapter_cases import adapted, lora_flags
from tests.loop.forked_processes import ProcessFactory
from torchrl_sglang.server import SGLangServer

PREFERRED = {"temperature": 0.6, "top_k": 5, "stop": ["e"], "min_new_tokens": 3, "repetition_penalty": 1.5}


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessFactory]:
    """Starts fake servers and trainers as processes, in 50 ms each."""
    with ProcessFactory(tmp_path_factory.mktemp("forked")) as started:
        yield started


@pytest.fixture
def url(pristine_server: SGLangServer) -> str:
    """The address of the shared server, for a test that changes its weights."""
    return pristine_server.url


@pytest.fixture(scope="session")
def saved_adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that PEFT has saved, of which every answer depends."""
    folder = tmp_path_factory.mktemp("adapters")
    adapted(tiny_llama, [{"target_modules": ["q_proj", "v_proj"]}], seed=11).save_pretrained(folder)
    return folder / "a0"


@pytest.fixture
def flagged_server(special_server: Callable[..., SGLangServer], saved_adapter: Path) -> SGLangServer:
    """A server started with flags that must not change what a request means.

    It takes adapters for all linear layers, has ``saved_adapter`` as ``"kind"``, fills in sampling parameters, and
    streams increments.
    """
    adapters = (*lora_flags("all"), "--lora-paths", f"kind={saved_adapter}")
    streams = ("--incremental-streaming-output", "--stream-interval", "3")
    return special_server(extra_args=(*adapters, *streams, "--preferred-sampling-params", json.dumps(PREFERRED)))
