"""Statistics of the training signal, importance weights, losses and advantages, against simple implementations."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict, TensorDictBase, lazy_stack

from torchrl_sglang import ConfigError, recipes
from torchrl_sglang.recipes.batch.sequences import Sequences
from torchrl_sglang.recipes.losses.critic import Critic
from torchrl_sglang.recipes.setup.optimizer import learning_rate_factor

LOG_PROBS = st.lists(st.floats(-30, 0), min_size=1, max_size=20)


def answers(*pairs: tuple[list[int], list[int]]) -> Sequences:
    """Answers with invented server log-probs."""
    num_tokens = sum(len(response) for _, response in pairs)
    return Sequences(
        prompt_B_T=[torch.tensor(prompt) for prompt, _ in pairs],
        response_B_R=[torch.tensor(response) for _, response in pairs],
        server_N=torch.linspace(-3, -1, num_tokens),
        version_N=torch.arange(num_tokens),
        reward_B=torch.arange(len(pairs)).float(),
        right_B=torch.ones(len(pairs), dtype=torch.bool),
        truncated_B=torch.zeros(len(pairs), dtype=torch.bool),
        position_B=torch.arange(len(pairs)),
    )


RAGGED = answers(([5, 6, 7, 8, 9], [10, 11]), ([12], [13, 14, 15, 16]), ([17, 18, 19], [20]))


# ----------------------------------------------------------------------------------------------- model scores


def test_scores_of_a_padded_batch_equal_those_of_each_answer_alone(model: torch.nn.Module) -> None:
    scores = recipes.score_tokens(model, RAGGED, temperature=0.7, entropy=True, hidden=True)
    expected, entropies, hidden = [], [], []
    for prompt, response in zip(RAGGED.prompt_B_T, RAGGED.response_B_R, strict=True):
        output = model(torch.cat([prompt, response])[None], output_hidden_states=True)
        log_probs = (output.logits[0, len(prompt) - 1 : -1] / 0.7).log_softmax(-1)
        expected.append(log_probs.gather(-1, response[:, None])[:, 0])
        entropies.append(torch.distributions.Categorical(logits=log_probs).entropy())
        hidden.append(output.hidden_states[-1][0, len(prompt) - 1 : -1])
    torch.testing.assert_close(scores.log_probs_N, torch.cat(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores.entropy_N, torch.cat(entropies), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scores.hidden_NH, torch.cat(hidden), atol=1e-4, rtol=1e-4)
    alone = recipes.hidden_states(model.base_model, RAGGED)
    torch.testing.assert_close(alone, torch.cat(hidden), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 9])
def test_gradients_of_micro_batches_add_up_to_those_of_the_batch(model: torch.nn.Module, micro_batch: int) -> None:
    def gradient(size: int) -> torch.Tensor:
        model.zero_grad()
        for tokens, part in RAGGED.split(size):
            weights_N = torch.arange(RAGGED.num_tokens)[tokens].float()
            ((weights_N * recipes.score_tokens(model, part).log_probs_N).sum() / RAGGED.num_tokens).backward()
        return model.get_input_embeddings().weight.grad.clone()

    torch.testing.assert_close(gradient(micro_batch), gradient(len(RAGGED)), atol=1e-5, rtol=1e-4)
    in_parts = recipes.score_in_parts(model, RAGGED, micro_batch=micro_batch)
    torch.testing.assert_close(in_parts, recipes.score_tokens(model, RAGGED).log_probs_N.detach())


def test_a_critic_starts_at_zero_and_a_head_passes_its_gradient_to_the_trunk(model: torch.nn.Module) -> None:
    model.zero_grad()
    head = Critic(model.config.hidden_size)
    values_N = head(RAGGED, recipes.score_tokens(model, RAGGED, hidden=True))
    assert values_N.tolist() == [0.0] * RAGGED.num_tokens
    torch.nn.init.normal_(head.head.weight)
    head(RAGGED, recipes.score_tokens(model, RAGGED, hidden=head.wants_hidden)).sum().backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0
    with pytest.raises(ConfigError, match="hidden=True"):
        head(RAGGED, recipes.score_tokens(model, RAGGED))


def as_batch(batch: Sequences) -> TensorDictBase:
    """The answers as a collector and ``MCAdvantage`` write them."""
    rows = [
        TensorDict(
            {
                "tokens": {"prompt": prompt, "response": response},
                "log_probs": {"response": server},
                "generation": {"weight_version": version, "truncated": torch.tensor(False)},
                "advantage": advantage.reshape(1, 1),
                "next": {"reward": torch.zeros(1, 1)},
            }
        )
        for prompt, response, server, version, advantage in zip(
            batch.prompt_B_T,
            batch.response_B_R,
            batch.per_answer(batch.server_N),
            batch.per_answer(batch.version_N),
            torch.tensor([1.0, -0.5, 2.0]),
            strict=True,
        )
    ]
    return lazy_stack(rows)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_torchrls_loss_is_the_clipped_surrogate_at_the_sampling_temperature(
    model: torch.nn.Module, temperature: float
) -> None:
    scores = recipes.score_tokens(model, RAGGED, temperature=temperature)
    near_N = scores.log_probs_N.detach() + torch.linspace(-0.3, 0.3, RAGGED.num_tokens)  # within and outside the clip
    batch = replace(RAGGED, server_N=near_N)
    advantage_N = torch.tensor([1.0, -0.5, 2.0]).repeat_interleave(torch.tensor(batch.lengths_B))
    expected = recipes.clipped_policy_loss(scores.log_probs_N, near_N, advantage_N, clip_epsilon=0.2).mean()
    model.zero_grad()
    expected.backward()
    gradient = model.get_input_embeddings().weight.grad.clone()

    actor = recipes.GRPOActor(model, temperature=temperature, entropy=True)
    loss = recipes.make_grpo_loss(actor, clip_epsilon=0.2)(as_batch(batch))
    model.zero_grad()
    loss.loss_objective.backward()
    torch.testing.assert_close(loss.loss_objective.detach(), expected.detach())
    torch.testing.assert_close(model.get_input_embeddings().weight.grad, gradient)
    torch.testing.assert_close(actor.scores.log_probs_N, scores.log_probs_N.detach())
    assert not actor.scores.log_probs_N.requires_grad
    assert actor.scores.entropy_N is not None


def test_the_actor_refuses_other_tokens_than_those_it_scored(model: torch.nn.Module) -> None:
    loss = recipes.make_grpo_loss(recipes.GRPOActor(model, temperature=1.0))
    loss.set_keys(action=("tokens", "prompt"))
    with pytest.raises(ConfigError, match="response tokens only"):
        loss(as_batch(RAGGED))


# ------------------------------------------------------------------------------------------------------ statistics


def test_the_training_signal_matches_its_definitions() -> None:
    server = torch.tensor([0.5, 0.5, 0.5, 0.5]).log()
    trainer = torch.tensor([0.5, 0.75, 0.25, 0.5]).log()
    signal = recipes.training_signal(trainer_N=trainer, server_N=server, clip_epsilon=0.4)
    ratios = [1.0, 1.5, 0.5, 1.0]
    assert signal["ratio_mean"] == pytest.approx(1.0)
    assert signal["ratio_max"] == pytest.approx(1.5)
    assert signal["clip_fraction"] == 0.5
    assert signal["ess"] == pytest.approx(sum(ratios) ** 2 / (4 * sum(r * r for r in ratios)))
    assert signal["logprob_gap_max"] == pytest.approx(math.log(2))
    assert signal["logprob_gap_mean"] == pytest.approx((math.log(2) + math.log(1.5)) / 4)
    assert signal["kl_behaviour_k1"] == pytest.approx(-(math.log(1.5) + math.log(0.5)) / 4)
    assert signal["kl_behaviour_k3"] == pytest.approx(sum(r - 1 - math.log(r) for r in ratios) / 4)
    assert "kl_reference_k1" not in signal


def test_the_kl_to_a_reference_is_that_of_the_trainer_from_it() -> None:
    p, q = torch.tensor([0.8, 0.2]), torch.tensor([0.5, 0.5])
    drawn = torch.multinomial(p, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    trainer_N = p.log()[drawn]
    signal = recipes.training_signal(
        trainer_N=trainer_N, server_N=trainer_N, reference_N=q.log()[drawn], clip_epsilon=0.2
    )
    exact = float((p * (p / q).log()).sum())
    assert signal["kl_reference_k1"] == pytest.approx(exact, abs=0.01)
    assert signal["kl_reference_k3"] == pytest.approx(exact, abs=0.01)


@given(LOG_PROBS, st.randoms())
def test_statistics_stay_finite_and_in_their_bounds(log_probs: list[float], shuffler: random.Random) -> None:
    other = log_probs.copy()
    shuffler.shuffle(other)
    signal = recipes.training_signal(trainer_N=torch.tensor(log_probs), server_N=torch.tensor(other), clip_epsilon=0.2)
    assert all(math.isfinite(value) for value in signal.values())
    assert 1 / len(log_probs) - 1e-9 <= signal["ess"] <= 1 + 1e-9
    assert signal["kl_behaviour_k3"] >= -1e-9
    assert signal["logprob_gap_mean"] <= signal["logprob_gap_max"] + 1e-9


def test_an_empty_batch_gives_nan() -> None:
    signal = recipes.training_signal(trainer_N=torch.zeros(0), server_N=torch.zeros(0), clip_epsilon=0.2)
    assert all(math.isnan(value) for value in signal.values())


def test_the_age_of_tokens_counts_from_the_trained_weights() -> None:
    numbers = recipes.batch_numbers(RAGGED, weight_version=8)
    assert numbers["staleness_histogram"] == "2:1 3:1 4:1 5:1 6:1 7:1 8:1"
    assert numbers["staleness_mean"] == 5.0
    assert numbers["staleness_max"] == 8
    assert numbers["response_tokens_mean"] == pytest.approx(7 / 3)


# ---------------------------------------------------------------------------------------------- weights and losses


@given(LOG_PROBS, st.floats(0.1, 10))
def test_truncated_weights_are_the_ratio_up_to_the_cap(log_probs: list[float], cap: float) -> None:
    log_mu_N = torch.full((len(log_probs),), -3.0)
    weights_N = recipes.truncated_importance_weights(torch.tensor(log_probs), log_mu_N, cap=cap)
    expected = [min(math.exp(value + 3.0), cap) for value in log_probs]
    torch.testing.assert_close(weights_N, torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_weights_pass_no_gradient_and_a_cap_that_is_not_positive_is_refused() -> None:
    log_pi_N = torch.zeros(2, requires_grad=True)
    assert not recipes.truncated_importance_weights(log_pi_N, torch.zeros(2)).requires_grad
    with pytest.raises(ConfigError, match="positive"):
        recipes.truncated_importance_weights(log_pi_N, log_pi_N, cap=0)


def test_importance_weights_make_the_gradient_of_old_tokens_that_of_the_current_policy() -> None:
    """E_mu[pi/mu * grad log pi * A] = E_pi[grad log pi * A], over every token there is."""
    logits = torch.tensor([0.3, -0.2, 0.9], requires_grad=True)
    mu, advantage = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([1.0, -2.0, 0.5])
    log_pi = logits.log_softmax(-1)
    weights = recipes.truncated_importance_weights(log_pi, mu.log(), cap=100.0)
    loss = recipes.clipped_policy_loss(log_pi, log_pi.detach(), advantage, clip_epsilon=0.2)
    (off_policy,) = torch.autograd.grad((mu * weights * loss).sum(), logits, retain_graph=True)
    (on_policy,) = torch.autograd.grad(-(log_pi.exp() * advantage).sum(), logits)
    torch.testing.assert_close(off_policy, on_policy)


def test_the_clipped_loss_has_no_gradient_beyond_the_clip() -> None:
    old_N = torch.full((4,), 0.5).log()
    new_N = torch.tensor([0.7, 0.7, 0.3, 0.3]).log().requires_grad_()
    advantage_N = torch.tensor([1.0, -1.0, 1.0, -1.0])
    recipes.clipped_policy_loss(new_N, old_N, advantage_N, clip_epsilon=0.2).sum().backward()
    assert (new_N.grad != 0).tolist() == [False, True, True, False]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.0), (0.9, 0.95)])
@pytest.mark.parametrize("lengths", [[3, 1, 2], [1, 1], [1], [40, 7]])
def test_advantages_match_the_definition_of_gae(lengths: list[int], gamma: float, lam: float) -> None:
    rewards_N, values_N = torch.randn(sum(lengths)), torch.randn(sum(lengths))
    advantages_N, returns_N = recipes.token_advantages(rewards_N, values_N, lengths, gamma=gamma, lam=lam)
    expected = []
    for rewards_R, values_R in zip(rewards_N.split(lengths), values_N.split(lengths), strict=True):
        after_R = [*values_R[1:].tolist(), 0.0]
        errors = [r + gamma * n - v for r, n, v in zip(rewards_R.tolist(), after_R, values_R.tolist(), strict=True)]
        expected += [sum((gamma * lam) ** k * e for k, e in enumerate(errors[t:])) for t in range(len(errors))]
    torch.testing.assert_close(advantages_N, torch.tensor(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(returns_N, advantages_N + values_N)


@pytest.mark.parametrize("right", [0, 1, 3, 6])
@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_pass_at_k_is_the_fraction_of_draws_with_a_right_answer(right: int, k: int) -> None:
    outcomes = [True] * right + [False] * (6 - right)
    draws = list(combinations(outcomes, k))
    assert recipes.pass_at_k(6, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_learning_rate_rises_and_then_follows_the_schedule(schedule: str) -> None:
    factor = learning_rate_factor(schedule, warmup_steps=4, total_steps=20)
    assert [factor(n) for n in range(4)] == [0.25, 0.5, 0.75, 1.0]
    rest = [factor(n) for n in range(4, 21)]
    assert rest == sorted(rest, reverse=True)
    assert rest[-1] == pytest.approx(1.0 if schedule == "constant" else 0.0, abs=1e-9)
