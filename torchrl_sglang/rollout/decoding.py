"""Text of responses, decoded from their token ids.

Shapes: ``B`` prompts, ``n`` responses each, ``S = B * n`` sequences prompt-major; ``P`` prompt, ``R`` response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.protocol.messages import GenerateReply
from torchrl_sglang.rollout.prompts import Prompts
from torchrl_sglang.rollout.settings import RolloutSettings
from torchrl_sglang.text_tokens import decode_ids, encode_untemplated, special_ids

__all__ = ["decode_behind_words", "decode_contents", "decode_responses"]

_WORD = "a"


def decode_responses(replies_S: Sequence[GenerateReply], settings: RolloutSettings, tokenizer: Any) -> list[str]:
    """Text of every response, with special tokens and stop strings unless ``generate_kwargs`` leaves them out.

    It is the text behind the prompt: with a space at its front where the tokens have one.
    """
    skips = bool(settings.decoding("skip_special_tokens"))
    trims = False in (settings.decoding("include_stop_str_in_output"), settings.decoding("no_stop_trim"))
    ids_S_R = [reply.output_ids for reply in replies_S]
    if trims:
        ids_S_R = [ids[:-1] if isinstance(r.matched, int) else ids for ids, r in zip(ids_S_R, replies_S, strict=True)]
    texts = decode_behind_words(ids_S_R, tokenizer, skips)
    if trims:
        for index, reply in enumerate(replies_S):
            # With stop_regex the server reports the pattern, which is not in the text.
            if isinstance(reply.matched, str) and reply.matched in texts[index]:
                before = decode_behind_words([reply.output_ids[:-1]], tokenizer, skips)[0]
                # Generation ends with the token that completes the stop string, and that token may reach beyond it.
                start = texts[index].find(reply.matched, max(0, len(before) - len(reply.matched) + 1))
                if start < 0:  # the token before was no whole character
                    start = texts[index].rfind(reply.matched)
                texts[index] = texts[index][:start]
    return texts


def decode_behind_words(
    ids_S_R: Sequence[Sequence[int]], tokenizer: Any, skip_special_tokens: bool = False
) -> list[str]:
    """Decode tokens as they read behind other text: at the front, SentencePiece tokenizers drop a space."""
    words = encode_untemplated(tokenizer, _WORD)
    joined = decode_ids(tokenizer, [[*words, *ids_R] for ids_R in ids_S_R], skip_special_tokens=skip_special_tokens)
    front = str(tokenizer.decode(words))
    if all(text.startswith(front) for text in joined):
        return [text[len(front) :] for text in joined]
    return decode_ids(tokenizer, ids_S_R, skip_special_tokens=skip_special_tokens)


def decode_contents(
    replies_S: Sequence[GenerateReply], prompts: Prompts, tokenizer: Any, stop_ids: Sequence[int] = ()
) -> list[str]:
    """Content of every assistant message: the response without the special token that ended it.

    The chat template writes the end of a message; with the token in the content too, the next turn's prompt would hold
    it twice. That holds whatever reason the server gives for the end: its own EOS may be another token. A space at the
    front is part of the content only if the template renders the response wrongly without it.
    """
    if not replies_S:
        return []
    special = special_ids(tokenizer)
    ends = special.intersection(stop_ids) | (prompts.renderer.turn_end_ids() if prompts.renderer else special)
    ids_S_R = []
    for reply in replies_S:
        last = reply.output_ids[-1] if reply.output_ids else None
        ended = last in ends or (last == reply.matched and last in special)
        ids_S_R.append(reply.output_ids[:-1] if ended else reply.output_ids)
    contents = decode_ids(tokenizer, ids_S_R)
    n = len(replies_S) // len(prompts.ids_B_T)
    for index, behind in enumerate(decode_behind_words(ids_S_R, tokenizer)):
        if behind != contents[index] and _needs_front(prompts, index // n, ids_S_R[index], contents[index], behind):
            contents[index] = behind
    return contents


def _needs_front(prompts: Prompts, index: int, ids_R: Sequence[int], content: str, behind: str) -> bool:
    """Whether the rendered conversation has the response's text only with the content as it reads behind the prompt."""
    renderer = prompts.renderer
    if renderer is None or prompts.messages_B is None:
        return False
    question, tokenizer = prompts.messages_B[index], renderer.tokenizer
    wanted = decode_ids(tokenizer, [[*prompts.ids_B_T[index], *ids_R]])[0]

    def renders(text: str) -> bool:
        answered = [*question, {"role": "assistant", "content": text}]
        rendered = renderer.render(answered, add_generation_prompt=False)
        return str(tokenizer.decode(renderer.encode(rendered))).startswith(wanted)

    try:
        return not renders(content) and renders(behind)
    except ConfigError:
        return False
