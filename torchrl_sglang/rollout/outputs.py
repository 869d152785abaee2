"""The rows that a policy returns: one TensorDict per sequence, with every TensorClass under its key.

Shapes: ``S`` sequences prompt-major, ``P`` prompt tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensordict import TensorDict
from torchrl.modules.llm.policies import ChatHistory, Text

from torchrl_sglang.config import SamplingParams
from torchrl_sglang.protocol.messages import GenerateReply
from torchrl_sglang.rollout.decoding import decode_behind_words, decode_contents, decode_responses
from torchrl_sglang.rollout.prompts import Prompts
from torchrl_sglang.rollout.requests import Answers
from torchrl_sglang.rollout.scoring import score_rows
from torchrl_sglang.rollout.settings import RolloutSettings
from torchrl_sglang.rollout.tensorclasses import (
    Padding,
    chat_rows,
    generation_rows,
    text_rows,
    token_rows,
)

__all__ = ["generated_rows", "scored_rows"]


def generated_rows(
    answers: Answers, settings: RolloutSettings, sampling: SamplingParams, padding: Padding, tokenizer: Any
) -> list[TensorDict]:
    """One TensorDict per generated sequence. ``tokenizer`` is only used in text and history mode."""
    n, prompts, replies_S = sampling.n, answers.prompts, answers.replies_S
    prompts_S_P = [ids_P for ids_P in prompts.ids_B_T for _ in range(n)]
    fields = token_rows(
        prompts_S_P,
        replies_S,
        padding,
        log_probs=settings.writes_log_probs,
        # vLLMWrapper leaves the full log-probs out when there is a sample dimension
        full_log_probs=settings.samples is None,
    )
    columns: list[tuple[Any, Sequence[Any]]] = [
        (settings.masks_key, [f["masks"] for f in fields]),
        (settings.tokens_key, [f["tokens"] for f in fields]),
    ]
    if settings.writes_log_probs:
        columns.append((settings.log_probs_key, [f["log_probs"] for f in fields]))
    if settings.writes_text:
        columns.extend(_text_columns(prompts, replies_S, settings, sampling, tokenizer))
    if settings.generation_key is not None:
        generation = generation_rows(
            replies_S,
            sampling,
            padding,
            dropped_S=[d for d in prompts.dropped_B or [0] * len(prompts.ids_B_T) for _ in range(n)],
            resumes_S=answers.resumes_S,
            errors_S=[e for e in answers.errors_B for _ in range(n)],
        )
        columns.append((settings.generation_key, generation))
        if settings.policy_version_key is not None:
            columns.append((settings.policy_version_key, [g.policy_version.clone() for g in generation]))
    return _rows(columns, len(replies_S))


def _text_columns(
    prompts: Prompts,
    replies_S: Sequence[GenerateReply],
    settings: RolloutSettings,
    sampling: SamplingParams,
    tokenizer: Any,
) -> list[tuple[Any, Sequence[Any]]]:
    """``text`` and, in history mode, ``history``. Decoded from the ids, since the server trims its own text."""
    responses = decode_responses(replies_S, settings, tokenizer)
    texts_B = prompts.texts_B or tokenizer.batch_decode(prompts.ids_B_T, skip_special_tokens=False)
    texts_S = [text for text in texts_B for _ in range(sampling.n)]
    if settings.writes_history:
        written = decode_behind_words([reply.output_ids for reply in replies_S], tokenizer)
    else:
        written = responses
    fulls = [text + response for text, response in zip(texts_S, written, strict=True)]
    columns: list[tuple[Any, Sequence[Any]]] = [(settings.text_key, text_rows(texts_S, responses, fulls))]
    if settings.writes_history:
        histories_S = [h for h in prompts.histories_B or [] for _ in range(sampling.n)]
        complete = [reply.finish_reason == "stop" for reply in replies_S]
        contents = decode_contents(replies_S, prompts, tokenizer, sampling.stop_token_ids)
        columns.append((settings.history_key, chat_rows(histories_S, contents, complete)))
    return columns


def scored_rows(answers: Answers, settings: RolloutSettings, padding: Padding) -> list[TensorDict]:
    """One TensorDict per scored sequence."""
    prompts = answers.prompts
    fields = score_rows(
        prompts.ids_B_T,
        answers.replies_S,
        padding,
        assistant_B_T=prompts.assistant_B_T,
        valid_B=[not error for error in answers.errors_B],
    )
    columns: list[tuple[Any, Sequence[Any]]] = [
        (settings.masks_key, [f["masks"] for f in fields]),
        (settings.tokens_key, [f["tokens"] for f in fields]),
        (settings.log_probs_key, [f["log_probs"] for f in fields]),
    ]
    if settings.writes_text:
        columns.append((settings.text_key, [Text(full=text) for text in prompts.texts_B or []]))
    if settings.writes_history:
        columns.append((settings.history_key, [ChatHistory(full=h, batch_size=()) for h in prompts.histories_B or []]))
    return _rows(columns, len(fields))


def _rows(columns: Sequence[tuple[Any, Sequence[Any]]], count: int) -> list[TensorDict]:
    rows = []
    for index in range(count):
        row = TensorDict()
        for key, values in columns:
            row.set(key, values[index])
        rows.append(row)
    return rows
