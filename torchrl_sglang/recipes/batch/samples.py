"""Convert answers to lines of ``samples.jsonl``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torchrl_sglang.recipes.batch.sequences import Sequences
from torchrl_sglang.recipes.batch.token_texts import token_texts

__all__ = ["sample_lines"]


def sample_lines(step: int, sequences: Sequences, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Yield one JSON object per answer.

    Args:
        step: the step that trained on the answers.
        sequences: the answers.
        tokenizer: decodes the ids.

    Yields:
        What a person reads first: ``prompt``, ``response``, ``reward``, ``right``, ``step``, ``truncated``,
        ``position``; then ``prompt_ids``, ``response_ids``, ``response_tokens`` (texts), ``log_probs`` and
        ``weight_versions`` (one per response token), ``weight_version`` (the newest of them).
    """
    log_probs_B_R, versions_B_R = sequences.per_answer(sequences.server_N), sequences.per_answer(sequences.version_N)
    for index, (prompt_T, response_R) in enumerate(zip(sequences.prompt_B_T, sequences.response_B_R, strict=True)):
        yield {
            "prompt": tokenizer.decode(prompt_T),
            "response": tokenizer.decode(response_R),
            "reward": sequences.reward_B[index].item(),
            "right": sequences.right_B[index].item(),
            "step": step,
            "truncated": sequences.truncated_B[index].item(),
            "position": sequences.position_B[index].item(),
            "prompt_ids": prompt_T.tolist(),
            "response_ids": response_R.tolist(),
            "response_tokens": token_texts(tokenizer, response_R.tolist()),
            "log_probs": log_probs_B_R[index].tolist(),
            "weight_versions": versions_B_R[index].tolist(),
            "weight_version": int(versions_B_R[index].max()) if len(response_R) else -1,
        }
