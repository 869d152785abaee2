"""Text of responses, decoded from their token ids.

Shapes: ``S`` sequences prompt-major, ``R`` response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchrl_sglang.protocol.messages import GenerateReply
from torchrl_sglang.rollout.settings import RolloutSettings

__all__ = ["decode_contents", "decode_responses"]


def decode_responses(replies_S: Sequence[GenerateReply], settings: RolloutSettings, tokenizer: Any) -> list[str]:
    """Text of every response, with special tokens and stop strings unless ``generate_kwargs`` leaves them out."""
    skips = bool(settings.decoding("skip_special_tokens"))
    trims = False in (settings.decoding("include_stop_str_in_output"), settings.decoding("no_stop_trim"))
    ids_S_R = [reply.output_ids for reply in replies_S]
    if trims:
        ids_S_R = [ids[:-1] if isinstance(r.matched, int) else ids for ids, r in zip(ids_S_R, replies_S, strict=True)]
    texts: list[str] = tokenizer.batch_decode(ids_S_R, skip_special_tokens=skips)
    if trims:
        for index, reply in enumerate(replies_S):
            # With stop_regex the server reports the pattern, which is not in the text.
            if isinstance(reply.matched, str) and reply.matched in texts[index]:
                texts[index] = texts[index].rpartition(reply.matched)[0]
    return texts


def decode_contents(
    replies_S: Sequence[GenerateReply], responses_S: Sequence[str], settings: RolloutSettings, tokenizer: Any
) -> list[str]:
    """Content of every assistant message: the response without the special token that ended it.

    The chat template writes the end of a message; with the token in the content too, the next turn's prompt would hold
    it twice.
    """
    special = set(tokenizer.all_special_ids)
    ids_S_R = [
        r.output_ids[:-1] if r.output_ids[-1:] == [r.matched] and r.matched in special else r.output_ids
        for r in replies_S
    ]
    decoded_whole = all(settings.decoding(n) is None for n in ("skip_special_tokens", "include_stop_str_in_output"))
    differing = [
        index
        for index, (ids_R, reply) in enumerate(zip(ids_S_R, replies_S, strict=True))
        if not decoded_whole or len(ids_R) < len(reply.output_ids)
    ]
    contents = list(responses_S)
    if differing:  # batch_decode([]) is one empty text
        for index, text in zip(differing, tokenizer.batch_decode([ids_S_R[i] for i in differing]), strict=True):
            contents[index] = text
    return contents
