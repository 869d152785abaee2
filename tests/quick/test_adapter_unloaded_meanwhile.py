"""A batch that is sent while the trainer pushes adapters: the one that it began with may be unloaded by then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from transformers import AutoModelForCausalLM

from tests.fake_sglang import FakeServer
from torchrl_sglang import RequestRejectedError, SamplingParams, SyncConfig, WeightSync
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.pool.batch import Batch

SHORT = SamplingParams(max_new_tokens=3, temperature=0, ignore_eos=True)


def test_it_is_answered_with_the_current_one(
    make: Callable[..., FakeServer], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = SGLangPool([SGLangClient(make(enable_lora=True).url)])
    pool.connect()
    sync = WeightSync(pool, SyncConfig(verify="off", transport="lora"))
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    sync.push(model)
    first = pool.state.weights.adapter
    assert first is not None
    send, names = Batch.send, []

    def late(self: Batch, *arguments: Any) -> Any:
        names.append(self.lora)
        if len(names) == 1:  # it has waited for a connection until now
            sync.push(model)
            sync.push(model)
        return send(self, *arguments)

    monkeypatch.setattr(Batch, "send", late)
    (reply,) = pool.generate([[5, 6, 7]], SHORT)
    current = pool.state.weights.adapter
    assert current is not None
    assert names == [first.name, current.name]
    assert reply.weight_version == current.version
    with pytest.raises(RequestRejectedError):  # the caller's own choice is not replaced
        pool.generate([[5, 6, 7]], SHORT, lora=first.name)
    sync.close()
