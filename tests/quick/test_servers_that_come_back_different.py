"""A server whose process was replaced by one that differs: another model, a shorter context, other ranks."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.fake_sglang import FakeServer, FakeSettings
from tests.fake_sglang.model import read_checkpoint
from torchrl_sglang import ConfigError, SamplingParams, ServerError, SyncConfig, WeightSync, WeightUpdateError
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool

Make = Callable[..., FakeServer]
MakeModel = Callable[..., Path]
PROMPTS = [[index + 3, 7, 8] for index in range(4)]
SHORT = SamplingParams(max_new_tokens=3, temperature=0, ignore_eos=True)
LOADED = SyncConfig(verify="off", transport="broadcast")


def pool_of(*servers: FakeServer) -> SGLangPool:
    pool = SGLangPool([SGLangClient(server.url) for server in servers])
    pool.connect()
    pool.generate(PROMPTS, SHORT)
    return pool


def find_dead(pool: SGLangPool, server: FakeServer) -> None:
    server.stop()
    with pytest.raises(ServerError):
        pool.generate(PROMPTS, SHORT)


def test_another_model_gets_no_requests(
    make: Make, make_model: MakeModel, replace: Make, caplog: pytest.LogCaptureFixture
) -> None:
    server = make()
    pool = pool_of(server)
    find_dead(pool, server)
    replace(server, model_path=make_model(arch="qwen2", seed=0))
    for _ in range(2):
        with pytest.raises(ServerError, match="no server is left.*serves.*one pool needs servers of one model"):
            pool.generate(PROMPTS, SHORT)
    said = [record for record in caplog.records if "stays out of routing" in record.getMessage()]
    assert [record.levelno for record in said] == [logging.WARNING]


def test_another_checkpoint_of_the_same_kind_gets_no_requests(make: Make, tiny_llama_b: Path, replace: Make) -> None:
    server = make()
    pool = pool_of(server)
    find_dead(pool, server)
    other = replace(server, model_path=tiny_llama_b)
    with pytest.raises(ServerError, match="has come back with another checkpoint"):
        pool.generate(PROMPTS, SHORT)
    replace(other)  # somebody has corrected it
    assert len(pool.generate(PROMPTS, SHORT)) == len(PROMPTS)


def test_a_shorter_context_gets_no_requests_and_a_longer_one_is_learnt(make: Make, replace: Make) -> None:
    server = make(max_total_tokens=1024)
    pool = pool_of(server)
    before = pool.max_prompt_tokens
    assert before is not None
    find_dead(pool, server)
    shorter = replace(server, max_total_tokens=128)
    with pytest.raises(ServerError, match="Start it with their --context-length"):
        pool.generate(PROMPTS, SHORT)
    assert pool.max_prompt_tokens == before
    replace(shorter, max_total_tokens=2048)
    pool.generate(PROMPTS, SHORT)
    assert pool.max_prompt_tokens == before + 1024


def test_an_update_goes_on_without_a_server_that_serves_another_model_now(
    make: Make, make_model: MakeModel, tiny_llama: Path, replace: Make
) -> None:
    first, second = make(), make()
    pool = pool_of(first, second)
    tensors = read_checkpoint(tiny_llama)
    sync = WeightSync(pool, LOADED)
    sync.push(tensors)
    other = replace(second, model_path=make_model(arch="qwen2", seed=0))
    held = other.weights[0]
    trained = {name: tensor + 1 for name, tensor in tensors.items()}
    assert sync.push(trained) is not None
    assert "it takes no weight updates: " in pool.quarantined[second.url]
    assert torch.equal(first.weights[0]["lm_head.weight"], trained["lm_head.weight"])
    assert all(torch.equal(tensor, held[name]) for name, tensor in other.weights[0].items())
    sync.close()


def test_an_update_of_a_single_server_that_serves_another_model_now_is_refused(
    make: Make, make_model: MakeModel, tiny_llama: Path, replace: Make
) -> None:
    server = make()
    pool = pool_of(server)
    sync = WeightSync(pool, LOADED)
    sync.push(read_checkpoint(tiny_llama))
    other = replace(server, model_path=make_model(arch="qwen2", seed=0))
    with pytest.raises(WeightUpdateError, match="no server takes weight updates: .*needs servers of one model"):
        sync.push(read_checkpoint(tiny_llama))
    assert pool.state.server(server.url).weights != "stuck", "it answers"
    corrected = replace(other)
    sync.push(read_checkpoint(tiny_llama))
    assert torch.equal(corrected.weights[0]["lm_head.weight"], read_checkpoint(tiny_llama)["lm_head.weight"])
    sync.close()


def test_a_server_that_comes_back_with_more_ranks_takes_the_next_update(
    make: Make, tiny_llama: Path, replace: Make
) -> None:
    first, second = make(), make()
    pool = pool_of(first, second)
    tensors = read_checkpoint(tiny_llama)
    sync = WeightSync(pool, LOADED)
    sync.push(tensors)
    wider = replace(second, tp_size=2)
    trained = {name: tensor + 1 for name, tensor in tensors.items()}
    sync.push(trained)
    for weights in (*first.weights, *wider.weights):
        assert torch.equal(weights["lm_head.weight"], trained["lm_head.weight"])
    assert len(wider.weights) == 2
    assert not pool.quarantined
    sync.close()


def test_models_of_one_architecture_and_other_sizes_make_no_pool(make: Make, make_model: MakeModel) -> None:
    settings = FakeSettings(model_path=make_model(arch="llama", seed=0, layers=3))
    with FakeServer(settings) as larger, pytest.raises(ConfigError, match="models of other sizes.*num_hidden_layers"):
        pool_of(make(), larger)


def test_tokenizers_with_other_ids_make_no_pool(make: Make, make_model: MakeModel, tmp_path: Path) -> None:
    first = make()
    other = tmp_path / "served"
    shutil.copytree(first.settings.model_path, other)
    with FakeServer(FakeSettings(model_path=other)) as copied:
        pool_of(first, copied)  # another folder, the same tokens
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    # As another version of tokenizers writes it.
    tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    tokenizer["added_tokens"] = [{**token, "normalized": True} for token in tokenizer["added_tokens"]]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with FakeServer(FakeSettings(model_path=other)) as written_by_another:
        pool_of(first, written_by_another)
    vocabulary = tokenizer["model"]["vocab"]
    (one, two), *_ = zip(vocabulary, list(vocabulary)[1:], strict=False)
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with (
        FakeServer(FakeSettings(model_path=other)) as swapped,
        pytest.raises(ConfigError, match="gives tokens other ids: one pool needs servers of one tokenizer"),
    ):
        pool_of(first, swapped)
