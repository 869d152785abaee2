"""A collector's rows in TorchRL's ``GRPOLoss`` and in the recipes: only sampled tokens are trained on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchrl
from torchrl.data import LazyStackStorage, ReplayBuffer
from torchrl.modules.llm import TransformersWrapper
from torchrl.objectives.llm import GRPOLoss

from torchrl_sglang import group_advantages, recipes
from torchrl_sglang.agents.collector.rewards import Reward
from torchrl_sglang.agents.collector.rows import Group, Run, make_batch
from torchrl_sglang.agents.types import Trajectory
from torchrl_sglang.recipes.losses.scoring import score_tokens

pytestmark = pytest.mark.torchrl

# Per run: tokens, which of them were sampled, and how many the run before in the session has too.
RUNS: list[list[tuple[list[int], list[int], int]]] = [
    [([5, 6, 7, 8, 9, 10, 11, 12], [0, 0, 1, 1, 0, 0, 1, 1], 0), ([5, 6, 7, 8, 20, 21, 22], [0, 0, 1, 1, 0, 1, 1], 4)],
    [([5, 6, 30, 31, 32], [0, 0, 1, 1, 1], 0)],
]


@pytest.fixture
def batch(model: Any, tokenizer: Any) -> Any:
    """Two runs of one task, with the log-probs of the model itself; the first has a conversation with a branch."""
    runs = []
    for number, leaves in enumerate(RUNS):
        trajectories = [
            Trajectory(
                token_ids=tuple(ids),
                loss_mask=tuple(mask),
                log_probs=tuple(p * m for p, m in zip(exact_log_probs(model, ids).tolist(), mask, strict=True)),
                weight_versions=tuple(3 if m else -1 for m in mask),
                temperatures=tuple(float(m) for m in mask),
                finish_reason="stop",
                messages=({"role": "user", "content": "?"},),
                parent=0 if shared else None,
                shared_tokens=shared,
                session=f"s{number}",
            )
            for ids, mask, shared in leaves
        ]
        reward = Reward(value=float(number), info={"right": bool(number)})
        runs.append(Run(session=f"s{number}", reward=reward, trajectories=trajectories))
    return group_advantages(make_batch([Group(number=7, task="?", runs=runs)], decode=tokenizer.decode))


def exact_log_probs(model: Any, ids: list[int]) -> torch.Tensor:
    """Log-prob of every token, 0 for the first."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].float()
    scores = logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    return torch.cat([torch.zeros(1), scores])


@pytest.mark.skipif(torchrl.__version__ < "0.14", reason="before 0.14 GRPOLoss does not leave out NaN")
def test_torchrls_loss_trains_on_sampled_tokens_alone(batch: Any, model: Any, tokenizer: Any) -> None:
    actor = TransformersWrapper(model, tokenizer=tokenizer, input_mode="tokens", generate=False, pad_output=False)
    loss = GRPOLoss(actor, entropy_bonus=False)(batch)
    assert loss.ESS.item() == pytest.approx(1, abs=1e-4), "the weights of the sampled tokens are not 1"
    assert abs(loss.kl_approx.item()) < 1e-5
    # Every importance weight is 1, so the objective is minus the mean advantage of the sampled tokens.
    low, high = -(2**-0.5), 2**-0.5
    own = [4, 2, 3]
    expected = -(own[0] * low + own[1] * low + own[2] * high) / sum(own)
    assert loss.loss_objective.item() == pytest.approx(expected, abs=1e-4)


def test_recipes_score_sampled_tokens_as_they_were_recorded(batch: Any, model: Any) -> None:
    read = recipes.Conversations.from_trajectories(batch)
    assert [int(written.sum()) for written in read.tokens.per_answer(read.written_N)] == [4, 2, 3]
    assert read.turns_B.tolist() == [2, 1, 1]
    assert read.num_written == 9
    with torch.no_grad():
        scored = score_tokens(model, read.tokens).log_probs_N
    torch.testing.assert_close(scored[read.written_N], read.tokens.server_N[read.written_N], atol=1e-5, rtol=0)
    assert not read.tokens.server_N[~read.written_N].any()
    assert read.tokens.version_N[read.written_N].unique().tolist() == [3]
    assert read.tokens.version_N[~read.written_N].unique().tolist() == [-1]
    assert read.tokens.right_B.tolist() == [False, False, True]
    assert read.tokens.reward_B.tolist() == [0, 0, 1]
    assert read.tokens.position_B.tolist() == [7, 7, 7]
    assert read.tokens.advantage_N is not None
    assert len(read.tokens.advantage_N) == read.tokens.num_tokens


def test_rows_fit_into_a_replay_buffer_and_over_a_device(batch: Any) -> None:
    buffer = ReplayBuffer(storage=LazyStackStorage(8), batch_size=3)
    buffer.extend(batch.to("cpu"))
    assert buffer.sample()["next", "reward"].shape == (3, 1, 1)


def test_different_temperatures_of_one_trajectory_are_not_one_number(tokenizer: Any) -> None:
    leaf = Trajectory(
        token_ids=(1, 2, 3),
        loss_mask=(0, 1, 1),
        log_probs=(0.0, -1.0, -1.0),
        weight_versions=(-1, 0, 0),
        temperatures=(0.0, 0.5, 1.0),
        exact_log_probs=False,
        finish_reason="length",
        messages=(),
        parent=None,
    )
    run = Run(session="s", reward=Reward(value=1.0), trajectories=[leaf])
    made = make_batch([Group(number=0, task="?", runs=[run])], decode=tokenizer.decode)
    assert made["generation", "temperature"].isnan().all()
    assert not made["generation", "exact_log_probs"].any()
    assert made["generation", "truncated"].all()
