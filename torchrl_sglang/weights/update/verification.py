"""Proof that a sync arrived: one fixed prompt scored on every server, and by the trainer's model if it can be called.

A server answers 200 to names it does not know, and over NCCL even before the data is there: only an answer made with
the new weights proves anything.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SamplingParams, SyncConfig
from torchrl_sglang.errors import WeightUpdateError
from torchrl_sglang.parallel import Outcome, Task, side_by_side
from torchrl_sglang.protocol.control import build_checksum, parse_checksum
from torchrl_sglang.protocol.generate import build_generate, parse_generate

__all__ = ["compare_checksums", "probe_ids", "prove", "trainer_logprobs"]

_one_at_a_time = threading.Lock()
_PROBE_TOKENS = 12
_PROBE_TOKENS_ON_CPU = 4


def probe_ids(vocab_size: int, num_tokens: int = _PROBE_TOKENS) -> list[int]:
    """The fixed prompt: token ids spread over the vocabulary, so that rows all over the embedding take part.

    Examples:
        >>> probe_ids(320, 4)
        [1, 264, 208, 152]
    """
    return [1 + (index * 7919) % (vocab_size - 1) for index in range(num_tokens)]


def prove(
    clients: Sequence[SGLangClient],
    *,
    vocab_size: int,
    model: nn.Module | None,
    config: SyncConfig,
    exact: bool,
    lora: str | None = None,
) -> float:
    """Score the fixed prompt everywhere and compare.

    Args:
        clients: the servers that were updated.
        vocab_size: number of valid token ids.
        model: the trainer's model; ``None`` compares the servers with each other only.
        config: tolerance.
        exact: trainer and servers compute in float32, so the narrow tolerance holds.
        lora: name of the adapter to score with.

    Returns:
        The largest log-prob difference seen (natural log).

    Raises:
        WeightUpdateError: a server did not answer, or answers as another model; ``server_weights`` names it.
    """
    # A GPU takes no longer for more tokens, and more experts of a mixture get to see one. A CPU does: of SmolLM2-135M,
    # which has none, 4 tokens took 0.11 s on a server's one core and 12 took 0.15.
    on_cpu = all(client.info.device == "cpu" for client in clients)
    ids = probe_ids(vocab_size, _PROBE_TOKENS_ON_CPU if on_cpu else _PROBE_TOKENS)
    scoring = {client.url: Task(_Scoring(client, ids, lora), name=f"score-{client.url}") for client in clients}
    asked = None if model is None else _asked(model, ids, on_cpu=on_cpu)  # meanwhile
    outcomes = {url: task.outcome() for url, task in scoring.items()}
    scores = {url: torch.tensor(o.value, dtype=torch.float64) for url, o in outcomes.items() if o.value is not None}
    complaints = _silent(outcomes)
    gaps: dict[str, float] = {}
    if scores:
        first = next(iter(scores))
        reference, whose = (asked, "the trainer") if asked is not None else (scores[first], first)
        atol = config.verify_atol if config.verify_atol is not None else (1e-3 if exact else 0.5)
        gaps = {url: _gap(score, reference) for url, score in scores.items()}
        for url, gap in gaps.items():
            if not gap <= atol:  # also catches NaN
                complaints[url] = (
                    f"{url} differs from {whose} by {gap:.2g} in log-prob (tolerance {atol:g}). Does the trainer's "
                    "model compute what the served checkpoint's architecture does? SyncConfig.verify_atol widens the "
                    "tolerance"
                )
    _refuse(complaints)
    return max(gaps.values())


def _asked(model: nn.Module, ids: Sequence[int], *, on_cpu: bool) -> torch.Tensor:
    try:
        with _half_of_the_cores() if on_cpu else nullcontext():
            return trainer_logprobs(model, ids)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        raise WeightUpdateError(
            "the weights were sent, but the trainer's model can't be asked for the proof, as "
            f"model(input_ids=...).logits ({error}): SyncConfig(verify='off') goes without"
        ) from error


@contextmanager
def _half_of_the_cores() -> Iterator[None]:
    """For what torch computes on the CPU beside a server that computes there too.

    Threads that wait for one that shares its core spin on theirs: on 2 cores both were done after 0.17 to 0.29 s with
    two threads here, after 0.11 to 0.14 s with one.
    """
    with _one_at_a_time:
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, threads // 2))
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _gap(score: torch.Tensor, reference: torch.Tensor) -> float:
    return float((score - reference).abs().max()) if score.shape == reference.shape else math.nan


def _silent(outcomes: Mapping[str, Outcome[Any]]) -> dict[str, str]:
    """A complaint for every server that gave no proof."""
    errors = {url: outcome.error for url, outcome in outcomes.items() if outcome.error is not None}
    return {url: f"{url} could not prove its new weights: {error}" for url, error in errors.items()}


def _refuse(complaints: Mapping[str, str]) -> None:
    if complaints:
        raise WeightUpdateError(
            "after the update: " + "; ".join(complaints.values()), server_weights=dict.fromkeys(complaints, "mixed")
        )


class _Scoring:
    """Asks one server for the log-probs of the fixed prompt, past the pool: the server is not in routing yet."""

    def __init__(self, client: SGLangClient, ids: list[int], lora: str | None) -> None:
        self._client = client
        self._ids = ids
        self._lora = lora

    def __call__(self) -> list[float]:
        request = build_generate([self._ids], SamplingParams(max_new_tokens=0), prompt_logprobs=True, lora=self._lora)
        answer = self._client.send(request, timeout_s=self._client.config.update_timeout_s)
        (reply,) = parse_generate(answer, num_expected=1, server=self._client.url, prompt_logprobs=True)
        # The first token has none. A server whose weights hold NaN says null for the others too.
        return [math.nan if value is None else value for value in (reply.prompt_logprobs or [])[1:]]


@torch.no_grad()
def trainer_logprobs(model: nn.Module, ids: Sequence[int]) -> torch.Tensor:
    """Log-prob of each token of ``ids`` after the first, by the trainer's model: float64, shape ``(len(ids) - 1,)``."""
    device = next(model.parameters()).device
    with _evaluating(model):
        logits = model(input_ids=torch.tensor([list(ids)], device=device)).logits[0, :-1]
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    targets = torch.tensor(list(ids[1:]), device=device)
    return log_probs.gather(1, targets[:, None])[:, 0].double().cpu()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off for the probe; every submodule's own mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def compare_checksums(clients: Sequence[SGLangClient]) -> None:
    """Compare the hashes of every tensor that the servers hold with those of the first server.

    Raises:
        WeightUpdateError: a server holds other tensors than the first, or did not answer.
    """
    outcomes = side_by_side({client.url: partial(client.send, build_checksum()) for client in clients})
    complaints = _silent(outcomes)
    sums = {url: parse_checksum(outcome.value) for url, outcome in outcomes.items() if outcome.error is None}
    first = next(iter(sums), "")
    for url, tensors in sums.items():
        different = sorted(name for name in sums[first].keys() | tensors if sums[first].get(name) != tensors.get(name))
        if different:
            complaints[url] = f"{url} holds other weights than {first}: {', '.join(different[:5])}"
    _refuse(complaints)
