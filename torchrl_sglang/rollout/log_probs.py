"""The trainer's log-probs that match those recorded while generating, so that the first importance ratio is 1.

A server records ``log_softmax(logits / temperature)`` of each token, with penalties and biases applied and before
top-k, top-p and min-p truncate the distribution; greedy decoding counts as temperature 1. A trainer's model applies
none of these. :func:`behaviour_log_probs` applies them to the trainer's logits; :func:`temper` divides a model's logits
by the temperature in every forward pass, which is enough where no penalties are used.

Shapes: ``R`` response tokens, ``V`` vocabulary, ``K`` ids left by truncation.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torch.utils.hooks import RemovableHandle

from torchrl_sglang.config import SamplingParams
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.rollout.generation import NO_ID

__all__ = ["behaviour_log_probs", "temper", "trainer_log_probs"]


def behaviour_log_probs(
    logits_RV: torch.Tensor,
    response_R: torch.Tensor,
    sampling: SamplingParams,
    *,
    support_RK: torch.Tensor | None = None,
    last_prompt_token: int | None = None,
) -> torch.Tensor:
    """Log-probs of a response as the server that sampled it would record them, from the trainer's logits.

    Args:
        logits_RV: raw logits that predict each response token.
        response_R: the response's token ids.
        sampling: how tokens were drawn: temperature, penalties and bias are applied as SGLang does.
        support_RK: ids that each token was chosen among (:attr:`Generation.support`); ``None`` for log-probs before
            truncation.
        last_prompt_token: needed with penalties, for a server with its default overlap schedule: it penalises a token
            one step late, and counts the last token of the prompt first (SGLang 0.5.23). ``None`` is for servers
            launched with ``--disable-overlap-schedule``, which count the response tokens before each token.

    Returns:
        ``(R,)`` log-probs, differentiable in the logits.

    Examples:
        >>> logits = torch.tensor([[0.0, 2.0], [2.0, 0.0]])
        >>> behaviour_log_probs(logits, torch.tensor([1, 1]), SamplingParams(temperature=2.0))
        tensor([-0.3133, -1.3133])
    """
    logits_RV = _penalised(logits_RV.float(), response_R, sampling, last_prompt_token)
    scores_RV = logits_RV / (1.0 if sampling.is_greedy else sampling.temperature)
    chosen_R = scores_RV.gather(-1, response_R[:, None])[:, 0]
    if support_RK is None:
        return chosen_R - scores_RV.logsumexp(-1)
    left_RK = scores_RV.gather(-1, support_RK.clamp(min=0))
    return chosen_R - left_RK.masked_fill(support_RK == NO_ID, -torch.inf).logsumexp(-1)


def _penalised(
    logits_RV: torch.Tensor, response_R: torch.Tensor, sampling: SamplingParams, last_prompt_token: int | None
) -> torch.Tensor:
    """Apply penalties: they count earlier response tokens and, with the overlap schedule, the last prompt token."""
    if not sampling.penalises:
        return logits_RV
    counted_R = response_R
    if last_prompt_token is not None:
        counted_R = torch.cat([response_R.new_tensor([last_prompt_token]), response_R[:-1]])
    seen_RV = torch.zeros_like(logits_RV)
    drawn_RV = torch.nn.functional.one_hot(counted_R, logits_RV.shape[-1]).to(logits_RV.dtype)
    seen_RV[1:] = drawn_RV[:-1].cumsum(0)
    logits_RV = logits_RV - sampling.frequency_penalty * seen_RV - sampling.presence_penalty * (seen_RV > 0)
    scale_RV = torch.where(seen_RV > 0, sampling.repetition_penalty, 1.0)
    logits_RV = torch.where(logits_RV < 0, logits_RV * scale_RV, logits_RV / scale_RV)
    bias_V = logits_RV.new_zeros(logits_RV.shape[-1])
    for token, value in (sampling.logit_bias or {}).items():
        bias_V[int(token)] += value
    return logits_RV + bias_V


def trainer_log_probs(
    model: Any,
    td: TensorDictBase,
    sampling: SamplingParams,
    *,
    tokens_key: Any = "tokens",
    generation_key: Any = None,
    overlapping: bool = True,
) -> list[torch.Tensor]:
    """A trainer's log-probs of recorded responses, computed as the recorded log-probs were.

    Args:
        model: a Hugging Face causal language model.
        td: what the policy returned, ragged (``pad_output=False``), of any batch shape.
        sampling: the policy's ``sampling_params``.
        tokens_key: where the tokens are.
        generation_key: where the :class:`Generation` is, if log-probs were recorded with ``exact_log_probs=True``.
        overlapping: the server was launched without ``--disable-overlap-schedule``, see :func:`behaviour_log_probs`.

    Returns:
        Per sequence ``(R,)`` log-probs, to compare with ``log_probs.response``.
    """
    flat = td.reshape(-1)
    log_probs = []
    for row in flat.unbind(0):
        prompt, full = row.get((tokens_key, "prompt")), row.get((tokens_key, "full"))
        support = row.get((generation_key, "support")) if generation_key is not None else None
        logits = model(full[None]).logits[0, len(prompt) - 1 : -1]
        last = int(prompt[-1]) if overlapping else None
        response = full[len(prompt) :]
        log_probs.append(behaviour_log_probs(logits, response, sampling, support_RK=support, last_prompt_token=last))
    return log_probs


def temper(model: torch.nn.Module, temperature: float) -> RemovableHandle:
    """Divide a model's logits by ``temperature`` from now on, so that a loss sees the distribution that was sampled.

    TorchRL's losses use an actor's logits unchanged; at a temperature other than 1 they would compare two different
    distributions. Parameters and their names do not change, so weight syncs are not affected.

    Args:
        model: a Hugging Face model, or any whose output has ``logits``.
        temperature: the policy's temperature; 0 (greedy) counts as 1.

    Returns:
        A handle whose ``remove()`` undoes it, also at the end of a ``with`` block.

    Raises:
        ConfigError: a negative temperature.
    """
    if temperature < 0:
        raise ConfigError(f"temperature must be at least 0, got {temperature}")

    def divide(module: torch.nn.Module, args: Any, output: Any) -> Any:
        output.logits = output.logits / (temperature or 1.0)
        return output

    return model.register_forward_hook(divide)
