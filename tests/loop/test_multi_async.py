"""MultiAsyncCollector: its workers do not wait for each other, and weights are updated while they run."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torchrl.collectors import MultiAsyncCollector
from transformers import AutoTokenizer

from tests.loop.rollout_cases import reference_log_probs
from tests.loop.sync_cases import assert_serves, load
from torchrl_sglang import SGLangWeightSyncScheme, SGLangWrapper, recipes
from torchrl_sglang.server import SGLangServer

WORKERS = 2


def test_asynchronous_workers_receive_an_update_and_label_each_token_with_its_weight_version(
    pristine_server: SGLangServer, tiny_llama: Path, tiny_llama_b: Path
) -> None:
    url = pristine_server.url
    models = [load(tiny_llama), load(tiny_llama_b)]
    task = recipes.make_task({"name": "arithmetic", "largest": 3, "held_out": 1})
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    make = functools.partial(recipes.make_env, task, tokenizer, questions=2, answers=1, seed=0)
    scheme = SGLangWeightSyncScheme(url)
    collector = MultiAsyncCollector(
        [make] * WORKERS,
        SGLangWrapper(url, generate_kwargs={"max_new_tokens": 6}, pad_output=True),
        frames_per_batch=2,
        total_frames=-1,
        weight_sync_schemes={"policy": scheme},
        use_buffers=False,  # buffers would require responses of one length
    )
    seen = []
    try:
        batches = iter(collector)
        for number in range(5 * WORKERS):
            if number == WORKERS:
                collector.update_policy_weights_(models[1])
                assert_serves(url, models[1], version=1)
            rows = next(batches).reshape(-1).unbind(0)
            assert len(rows) == 2
            for row in rows:
                made = int(row["generation"].completion_tokens)
                real = row["tokens", "full"][row["masks", "all_attention_mask"]]
                # A response that was under way during the update continues with the new weights: a version per token.
                versions_R = row["generation"].weight_version[:made]
                expected_VR = torch.stack([reference_log_probs(model, real)[-made:] for model in models])
                expected_R = expected_VR.gather(0, versions_R[None])[0]
                torch.testing.assert_close(row["log_probs", "response"][:made], expected_R, atol=1e-4, rtol=0)
                assert int(row["generation"].policy_version) == int(versions_R.min())
                seen.append(int(versions_R.min()))
    finally:
        collector.shutdown()
        scheme.shutdown()
    assert seen[: 2 * WORKERS] == [0] * 2 * WORKERS
    assert seen[-2 * WORKERS :] == [1] * 2 * WORKERS, "the batches that were ready before the update have been returned"
    assert scheme.last_report is None or scheme.last_report.version == 1
