"""``AsyncSGLang``, method by method, at a real server; and a fleet of real ones that loses a member."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import pickle
import re
import signal
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.loop.forked_processes import wait_until
from tests.loop.sync_cases import PROMPTS, assert_serves, load
from torchrl_sglang import (
    AsyncSGLang,
    ConfigError,
    RequestRejectedError,
    SamplingParams,
    ServerUnreachableError,
)
from torchrl_sglang.parallel import Task
from torchrl_sglang.protocol.control import parse_loads
from torchrl_sglang.protocol.dialect import MODEL_INFO
from torchrl_sglang.protocol.messages import HttpRequest
from torchrl_sglang.server import SGLangServer

GREEDY = SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True)
TEXTS = ["The capital of France is", "Hello world!"]


def test_one_or_many_text_or_ids_log_probs_or_not(engine: AsyncSGLang) -> None:
    one = engine.generate(TEXTS[0], sampling_params=GREEDY)
    many = engine.generate_batch(TEXTS, sampling_params=GREEDY)
    by_ids = engine.generate(input_ids=[engine.tokenizer.encode(text) for text in TEXTS], sampling_params=GREEDY)
    assert [reply.output_ids for reply in many] == [reply.output_ids for reply in by_ids]
    assert one.output_ids == many[0].output_ids
    assert one.text == engine.tokenizer.decode(one.output_ids)
    assert len(one.output_logprobs) == 6
    assert engine.generate_batch(TEXTS[:1], sampling_params=GREEDY)[0].output_ids == one.output_ids
    bare = engine.generate(TEXTS[0], sampling_params=GREEDY, return_logprobs=False, return_text=False)
    assert (bare.output_logprobs, bare.text, bare.output_ids) == (None, "", one.output_ids)
    several = engine.generate(TEXTS[0], n=2, max_new_tokens=3, ignore_eos=True)
    assert [len(reply.output_ids) for reply in several] == [3, 3]
    with pytest.raises(ConfigError, match="give either prompts"):
        engine.generate(TEXTS, input_ids=[[1]])
    with pytest.raises(ConfigError, match="not both"):
        engine.generate(TEXTS, sampling_params=GREEDY, temperature=1.0)


def test_in_an_event_loop_several_batches_run_at_the_same_time(engine: AsyncSGLang) -> None:
    async def both() -> list[Any]:
        return await asyncio.gather(*(engine.agenerate(text, sampling_params=GREEDY) for text in TEXTS))

    expected = engine.generate_batch(TEXTS, sampling_params=GREEDY)
    assert [reply.output_ids for reply in asyncio.run(both())] == [reply.output_ids for reply in expected]


def test_a_stream_grows_to_the_whole_answer(engine: AsyncSGLang) -> None:
    whole = engine.generate(TEXTS[0], sampling_params=GREEDY)
    seen = [reply.output_ids for reply in engine.stream(TEXTS[0], sampling_params=GREEDY, return_logprobs=True)]
    assert seen[-1] == whole.output_ids
    assert [len(ids) for ids in seen] == sorted({len(ids) for ids in seen})
    with pytest.raises(ConfigError, match="a stream carries one sequence"):
        engine.stream(TEXTS[0], n=2)


def test_what_is_served_and_where_the_trainer_is_met(engine: AsyncSGLang, tiny_llama: Path) -> None:
    assert (engine.get_tp_size(), engine.get_dp_size(), engine.weight_version) == (1, 1, 0)
    served = {name: (p.dtype, p.shape) for name, p in load(tiny_llama).state_dict().items()}
    assert engine.get_model_metadata() == served
    assert engine.get_master_address() == "127.0.0.1"
    assert engine.get_master_port() is None
    engine.flush_cache()
    copy = pickle.loads(pickle.dumps(engine))
    assert copy.generate(TEXTS[0], sampling_params=GREEDY).output_ids
    assert not copy.restart(copy.pool.clients[0].url)
    copy.shutdown()
    assert engine.generate(TEXTS[0], sampling_params=GREEDY).output_ids


def test_weights_through_the_engine_itself(pristine_server: SGLangServer, tiny_llama: Path, tiny_llama_b: Path) -> None:
    with AsyncSGLang.connect(pristine_server.url) as engine:
        start = engine.weight_version
        engine.init_weight_update_group("127.0.0.1")
        assert engine.get_master_address() == "127.0.0.1"
        report = engine.update_weights(load(tiny_llama_b))
        assert report is not None
        assert_serves(pristine_server.url, load(tiny_llama_b), version=start + 1)
        # One tensor, the others stay.
        name = "model.norm.weight"
        mixed = load(tiny_llama_b)
        with torch.no_grad():
            mixed.model.norm.weight.mul_(1.5)
        tensor = mixed.model.norm.weight.detach()
        engine.update_weights_from_distributed(name, tensor.dtype, tensor.shape, tensor)
        assert_serves(pristine_server.url, mixed, version=start + 2)
        with pytest.raises(ConfigError, match="was announced as"):
            engine.update_weights_from_distributed(name, torch.float16, tensor.shape, tensor)
        assert engine.weight_version == start + 2


def test_a_cpu_server_is_not_asked_for_gpu_memory(engine: AsyncSGLang) -> None:
    """It would answer 200, free nothing, and die of a resume that follows no release."""
    with pytest.raises(ConfigError, match="runs on the CPU: it holds no GPU memory"), engine.offloaded():
        pytest.fail("the block was entered")
    assert engine.generate(TEXTS[0], sampling_params=GREEDY).output_ids


def test_the_examples_in_the_docstring_run(engine: AsyncSGLang, capsys: pytest.CaptureFixture[str]) -> None:
    """The one that asks a server; the one that launches two is what ``test_restarts.py`` does."""
    found = re.findall(r"::\n\n((?: {12}.*\n|\n)+)", inspect.getsource(AsyncSGLang))
    blocks = [textwrap.dedent(block) for block in found]
    assert ["connect" in block for block in blocks[:2]] == [True, False]
    names: dict[str, Any] = {"AsyncSGLang": AsyncSGLang}
    exec(blocks[0].replace("http://127.0.0.1:30000", engine.pool.clients[0].url), names)
    shown = capsys.readouterr().out
    assert str(names["reply"].output_logprobs) in shown
    assert shown.rstrip("\n").endswith(names["so_far"].text.rstrip("\n"))
    assert [len(reply.output_ids) for reply in names["replies"]] == [4, 4]


def test_nobody_there_somebody_else_there(engine: AsyncSGLang) -> None:
    with pytest.raises(ServerUnreachableError, match="nothing accepts connections"):
        AsyncSGLang.connect("http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="unknown argument 'api_kye'. Did you mean 'api_key'"):
        AsyncSGLang.connect("http://127.0.0.1:9", api_kye="x")
    with pytest.raises(RequestRejectedError, match="404"):
        engine.pool.clients[0].send(HttpRequest(method="GET", path="/no-such-thing"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_fleet_behind_a_router_loses_a_server_and_gets_it_back(
    needs_sglang: None,
    tiny_llama: Path,
    tiny_llama_b: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Killed in the middle of a batch, started again, left out until it has the current weights, and back."""
    caplog.set_level(logging.WARNING)
    long = SamplingParams(max_new_tokens=400, temperature=0, ignore_eos=True)
    prompts = [[3 + index, 7, 8] for index in range(16)]
    with AsyncSGLang.from_pretrained(
        str(tiny_llama), dp_size=2, device="cpu", max_model_len=1024, router=True, restart="on-failure"
    ) as engine:
        loses_one_and_gets_it_back(engine, prompts, long, load(tiny_llama_b))
        assert "exit code 137 (SIGKILL)" in caplog.text


def loses_one_and_gets_it_back(
    engine: AsyncSGLang, prompts: list[list[int]], long: SamplingParams, model: torch.nn.Module
) -> None:
    pool = engine.pool
    assert engine.router is not None
    assert pool.context_length == 1022  # SGLang keeps two
    expected = [reply.output_ids for reply in pool.generate(prompts, long)]
    assert {reply.server for reply in pool.generate(prompts, GREEDY)} == {engine.router.url}

    urls = [client.url for client in pool.clients]
    for count, options in enumerate(({}, {"progress": lambda _: None}), start=1):  # through the router, and past it
        batch = Task(lambda options=options: pool.generate(prompts, long, **options), name="batch")
        wait_until(lambda: loads(pool.clients[0]) > 0, "the batch never came", 30)
        kill(engine.servers[0])
        assert [reply.output_ids for reply in batch.outcome().unwrap()] == expected
        await_restarts(engine, count)
        assert not pool.quarantined, "nothing was synced: the checkpoint's weights are the current ones"

    engine.update_weights(model)
    assert_serves(urls, model, version=1, api_key=engine.api_key)
    kill(engine.servers[0])
    await_restarts(engine, 3)
    assert list(pool.quarantined) == [urls[0]]
    assert pool.clients[0].send(MODEL_INFO)["weight_version"] == "dirty-2"
    assert pool.router is not None
    assert list(pool.router.workers()) == [urls[1]]
    assert len(pool.generate(PROMPTS, GREEDY)) == len(PROMPTS)
    engine.update_weights(model)
    assert_serves(urls, model, version=2, api_key=engine.api_key)
    assert pool.router.workers().keys() == set(urls)


def kill(server: SGLangServer) -> None:
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)


def await_restarts(engine: AsyncSGLang, count: int) -> None:
    url = engine.pool.clients[0].url
    wait_until(lambda: engine.pool.state.server(url).restarts == count, "it did not come back", 150)
    wait_until(lambda: "being restarted" not in engine.pool.quarantined.get(url, ""), "it is not admitted", 60)


def loads(client: Any) -> int:
    return parse_loads(client.send(HttpRequest(method="GET", path="/v1/loads", timeout="probe")))
