"""TorchRL's trainers push weights through the scheme: with a weight-update map, with a sender, and in a GRPO run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torchrl.data import LazyStackStorage, ReplayBuffer, SamplerWithoutReplacement
from torchrl.modules.llm import TransformersWrapper
from torchrl.objectives.llm import GRPOLoss, MCAdvantage
from torchrl.trainers.trainers import UpdateWeights
from transformers import AutoTokenizer

from tests.loop.sync_cases import assert_serves, load, make_collector
from torchrl_sglang import ConfigError, SGLangWeightSender, SGLangWeightSyncScheme


@contextmanager
def closing_sender(url: str) -> Iterator[SGLangWeightSender]:
    sender = SGLangWeightSyncScheme(url).create_sender()
    try:
        yield sender
    finally:
        sender.shutdown()


def wrapped(model: Any, folder: Path) -> TransformersWrapper:
    return TransformersWrapper(
        model, tokenizer=AutoTokenizer.from_pretrained(folder), generate=False, input_mode="tokens", pad_output=False
    )


@pytest.mark.torchrl
def test_a_weight_update_map_finds_the_actor_in_the_loss(url: str, tiny_llama: Path, tiny_llama_b: Path) -> None:
    model = load(tiny_llama_b)
    trainer = SimpleNamespace(loss_module=GRPOLoss(wrapped(model, tiny_llama), entropy_bonus=False))
    collector = make_collector(url, tiny_llama, SGLangWeightSyncScheme(url))
    try:
        UpdateWeights(collector, 1, weight_update_map={"policy": "loss_module.actor_network"}, trainer=trainer)()
        assert_serves(url, model, version=1)
    finally:
        collector.shutdown()


def test_a_sender_sends_the_registered_model_and_counts_versions(
    url: str, tiny_llama: Path, tiny_llama_b: Path
) -> None:
    model, increments = load(tiny_llama_b), []
    with closing_sender(url) as sender:
        with pytest.raises(ConfigError, match=r"register_model\(model\)"):
            sender.update_weights()
        sender.register_model(model)
        sender.register_collector(SimpleNamespace(increment_version=lambda: increments.append(1)))
        sender.init_all_workers_group(dict(model.named_parameters()))
        UpdateWeights(sender=sender)()
        assert_serves(url, model, version=1)
        report = sender.update_weights(load(tiny_llama).state_dict())
        assert report is not None
        assert report.version == 2
        assert_serves(url, load(tiny_llama), version=2)
        assert len(increments) == 2


def test_torchrls_grpo_trainer_trains_and_updates_the_server(url: str, tiny_llama: Path) -> None:
    grpo = pytest.importorskip("torchrl.trainers.algorithms.grpo")
    model = load(tiny_llama)
    before = [p.detach().clone() for p in model.parameters()]
    actor = wrapped(model, tiny_llama)
    with closing_sender(url) as sender:
        sender.register_model(actor)
        collector = make_collector(url, tiny_llama, None, questions=("dog", "dog"), total_frames=8)
        buffer = ReplayBuffer(
            storage=LazyStackStorage(4),
            sampler=SamplerWithoutReplacement(),
            batch_size=2,
            transform=MCAdvantage(grpo_size=2),
        )
        trainer = grpo.GRPOTrainer(
            collector=collector,
            total_frames=8,
            loss_module=GRPOLoss(actor, entropy_bonus=True),
            optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
            weight_sync_sender=sender,
            replay_buffer=buffer,
            empty_replay_buffer_on_weight_update=True,
            progress_bar=False,
            log_rewards=False,
            log_kl=False,
        )
        trainer.train()
    assert any(not torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True)), (
        "training changed no parameter"
    )
    assert_serves(url, model, version=4)
