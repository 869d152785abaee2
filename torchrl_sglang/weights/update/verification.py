"""Verifies a sync: by the servers' checksums, and by scoring one fixed prompt on every server and on the trainer.

A server answers 200 to names it does not know, and over NCCL even before the data is there: only what it computes from
the new weights shows that they have arrived. In half precision the scores of two successive versions can't be told
apart, but the checksums can; the scores show whether the server computes what the trainer does.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import nn

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SamplingParams, SyncConfig
from torchrl_sglang.errors import SGLangError, WeightUpdateError
from torchrl_sglang.forks import ForkSafeLock
from torchrl_sglang.parallel import Task
from torchrl_sglang.protocol.generate import build_generate, parse_generate
from torchrl_sglang.weights.checksums.verifier import PushChecksums
from torchrl_sglang.weights.source.interface import WeightSource
from torchrl_sglang.weights.source.shards import is_sharded
from torchrl_sglang.weights.update.likely_cause import likely_cause
from torchrl_sglang.weights.update.report import SyncReport

__all__ = ["Probe", "probe_ids", "trainer_logprobs", "verify_servers"]

_one_at_a_time = ForkSafeLock()
_PROBE_TOKENS = 12
_PROBE_TOKENS_ON_CPU = 4


def probe_ids(vocab_size: int, num_tokens: int = _PROBE_TOKENS) -> list[int]:
    """The fixed prompt: token ids spread over the vocabulary, so that many rows of the embedding take part.

    Examples:
        >>> probe_ids(320, 4)
        [1, 264, 208, 152]
    """
    return [1 + (index * 7919) % (vocab_size - 1) for index in range(num_tokens)]


class Probe:
    """The fixed prompt of one push, and the log-probs that the trainer's model gives it.

    Args:
        clients: the servers that are updated.
        vocab_size: number of valid token ids; ``None``, where it is unknown, makes an empty prompt.
        source: the trainer's weights. Without a model among them, and if it is sharded (it computes only when all ranks
            call it), the servers' log-probs are compared with each other.
        has_experts: whether the model is a mixture of experts.

    Attributes:
        ids: the prompt.
        model: the trainer's model, if it can be asked.
        has_experts: as given.
    """

    def __init__(
        self,
        clients: Sequence[SGLangClient],
        vocab_size: int | None,
        source: WeightSource,
        *,
        has_experts: bool = False,
    ) -> None:
        self.has_experts = has_experts
        # On a GPU more tokens cost nothing, and more experts of a mixture take part. On a CPU they cost time, but not
        # below 4: SmolLM2-135M on one core took 53 ms for 1 token, 80 for 2, 101 for 3, 70 for 4 and 96 for 12.
        self._on_cpu = all(client.info.device == "cpu" for client in clients)
        num_tokens = _PROBE_TOKENS_ON_CPU if self._on_cpu else _PROBE_TOKENS
        self.ids = [] if vocab_size is None else probe_ids(vocab_size, num_tokens)
        self.model = None if source.module is None or is_sharded(source.module) else source.module
        self._num_ranks = sum(client.info.tp_size for client in clients)
        self._task: Task[torch.Tensor] | None = None

    def start(self) -> None:
        """Let the trainer's model compute in a thread, while servers on this host load weights that wait in memory.

        Does nothing unless a core is idle meanwhile: each rank of a server loads with one.
        """
        is_idle = self._on_cpu and self._num_ranks < len(os.sched_getaffinity(0))
        if is_idle and self.ids and self.model is not None and next(self.model.parameters()).device.type == "cpu":
            self._task = Task(partial(self._compute, self.model), name="trainer-logprobs")

    def expected(self) -> torch.Tensor | None:
        """The trainer's log-probs: float64, ``(len(ids) - 1,)``; ``None`` if no model can be asked.

        Raises:
            WeightUpdateError: the model can't be called.
        """
        if not self.ids or self.model is None:
            return None
        return self._compute(self.model) if self._task is None else self._task.outcome().unwrap()

    def end(self) -> None:
        """Wait until nothing computes with the model any more."""
        if self._task is not None:
            self._task.wait()

    def _compute(self, model: nn.Module) -> torch.Tensor:
        try:
            with _half_of_the_cores() if self._on_cpu else nullcontext():
                return trainer_logprobs(model, self.ids)
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
            raise WeightUpdateError(
                "the weights were sent, but they can't be verified: the trainer's model can't be called as "
                f"model(input_ids=...).logits ({error}). SyncConfig(verify='off') switches verification off"
            ) from error


def verify_servers(
    clients: Sequence[SGLangClient],
    *,
    probe: Probe,
    source: WeightSource,
    config: SyncConfig,
    served_dtype: torch.dtype | None,
    checksums: PushChecksums | None,
    report: SyncReport,
    lora: str | None = None,
) -> None:
    """Compare the servers' checksums with those of what was sent, and the log-probs of a fixed prompt.

    Args:
        clients: the servers that were updated.
        probe: the prompt.
        source: the trainer's weights.
        config: tolerance.
        served_dtype: what the servers compute in. If trainer and servers compute in float32, the tolerance is narrow.
        checksums: those of this push.
        report: records what was compared, and the largest log-prob difference (natural log).
        lora: name of the adapter to score with.

    Raises:
        WeightUpdateError: a server did not answer, holds other tensors or scores as another model; ``server_weights``
            names it.
    """
    if checksums is not None:
        # Before the prompt: to hash keeps a core busy, to score the memory, which the trainer's model needs now.
        checksums.start_reading(clients)
    asked = clients if probe.ids else ()
    scoring = {client.url: Task(_Scoring(client, probe.ids, lora), name=f"score-{client.url}") for client in asked}
    expected = probe.expected()
    stale: Mapping[str, str] = {}
    failed: Mapping[str, SGLangError] = {}
    if checksums is not None:
        stale, failed = checksums.compare()  # hashes here what was sent, while the servers score
        report.num_checksums = checksums.verdict.num_equal
        report.not_compared = checksums.not_compared
    complaints, gaps = _compare_scores(scoring, probe, expected, config, served_dtype)
    cause = ""
    if gaps.keys() & complaints.keys():
        served = clients[0].info.architectures
        cause = likely_cause(probe.model, source.architecture, served=served, served_dtype=served_dtype)
    _raise_if_any({**complaints, **_unanswered(failed), **stale}, cause, is_adapter=lora is not None)
    report.max_logprob_gap = max(gaps.values(), default=None)


def _compare_scores(
    scoring: Mapping[str, Task[list[float]]],
    probe: Probe,
    expected: torch.Tensor | None,
    config: SyncConfig,
    served_dtype: torch.dtype | None,
) -> tuple[dict[str, str], dict[str, float]]:
    """Compare the servers' scores with the trainer's; returns what is wrong, and per server the largest difference.

    A mixture of experts in half precision is judged by its median difference: where two experts are nearly as likely,
    rounding chooses, and the scores of that token are another expert's.
    """
    outcomes = {url: task.outcome() for url, task in scoring.items()}
    scores = {url: torch.tensor(o.value, dtype=torch.float64) for url, o in outcomes.items() if o.value is not None}
    complaints = _unanswered({url: o.error for url, o in outcomes.items() if o.error is not None})
    gaps: dict[str, float] = {}
    if scores:
        first = next(iter(scores))
        reference, whose = (expected, "the trainer") if expected is not None else (scores[first], first)
        parameters = probe.model.parameters() if probe.model is not None else ()
        is_exact = {served_dtype, *(parameter.dtype for parameter in parameters)} == {torch.float32}
        default = 1e-3 if is_exact else 0.5
        atol = default if config.verify_atol is None else config.verify_atol
        for url, score in scores.items():
            differences = _differences(score, reference)
            gaps[url] = float(differences.max())
            judged = float(differences.median()) if probe.has_experts and not is_exact else gaps[url]
            if not judged <= atol:  # also catches NaN
                complaints[url] = f"{url} differs from {whose} by {judged:.2g} in log-prob (tolerance {atol:g})"
    return complaints, gaps


@contextmanager
def _half_of_the_cores() -> Iterator[None]:
    """Halve torch's threads for a computation on the CPU beside a server that computes there too.

    A thread that waits for another one, which shares its core with the server, spins: on 2 cores both were done after
    0.17 to 0.29 s with two threads here, after 0.11 to 0.14 s with one.
    """
    with _one_at_a_time:
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, threads // 2))
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _differences(score: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    return (score - reference).abs() if score.shape == reference.shape else torch.tensor([math.nan])


def _unanswered(errors: Mapping[str, SGLangError]) -> dict[str, str]:
    """An error text for every server that did not answer."""
    return {url: f"{url} could not be verified: {error}" for url, error in errors.items()}


def _raise_if_any(complaints: Mapping[str, str], cause: str, *, is_adapter: bool) -> None:
    if complaints:
        urls = ", ".join(complaints)
        cause = f" {cause}" if cause else ""
        now = "requests use the previous adapter" if is_adapter else f"{urls} generates nothing until it is verified"
        raise WeightUpdateError(
            f"the weights were sent, but are unverified: {'; '.join(complaints.values())}.{cause} Now {now}. "
            "servers.update_weights(model) sends all weights again and verifies them",
            server_weights=dict.fromkeys(complaints, "mixed"),
        )


class _Scoring:
    """Scores the fixed prompt on one server, past the pool: the server may not be routed yet."""

    def __init__(self, client: SGLangClient, ids: list[int], lora: str | None) -> None:
        self._client = client
        self._ids = ids
        self._lora = lora

    def __call__(self) -> list[float]:
        request = build_generate([self._ids], SamplingParams(max_new_tokens=0), prompt_logprobs=True, lora=self._lora)
        answer = self._client.send(request, timeout_s=self._client.config.update_timeout_s)
        (reply,) = parse_generate(answer, num_expected=1, server=self._client.url, prompt_logprobs=True)
        # The first token has none. A server whose weights hold NaN returns null for the others.
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
    """Switch dropout off, and afterwards restore the mode of every submodule."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
