"""The next turn's prompt from the last turn's tokens, so that generated text is not tokenized again.

Tokenizing the whole conversation in every turn may give other tokens than those the model generated: then the prefix
cache misses, and a trainer learns from tokens that were never sampled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchrl_sglang.chat_templates import ChatRenderer
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.text_tokens import decode_ids, special_ids

__all__ = ["RewrittenAnswer", "continue_tokens"]

_TAIL = 32  # last characters of an answer, by which it is found in its tokens


class RewrittenAnswer(Exception):
    """The tokens are those of the conversation, but the template renders an earlier answer otherwise."""


@dataclass(frozen=True, slots=True)
class _Gap:
    """What the template writes after an answer, up to the next one.

    Attributes:
        text: the whole text.
        ids: its tokens.
        rest: those behind the special token that ends the answer's message; ``None`` if it doesn't begin with one.
    """

    text: str
    ids: list[int]
    rest: list[int] | None


def continue_tokens(
    ids_T: Sequence[int], messages: Sequence[Mapping[str, Any]], renderer: ChatRenderer, *, rewritten: bool = False
) -> list[int] | None:
    """Extend the tokens of an earlier state of a conversation by what the template has written since.

    The tokens must be the rendered beginning of the conversation, and the tokens of each answer must decode to what the
    template renders for it; white space at an answer's ends doesn't count. What follows the last answer is tokenized
    as it is in the rendered conversation, without a beginning-of-text mark. A token that ended the answer is not
    written again, also where it is another one than the template's.

    Args:
        ids_T: tokens of the earlier state, e.g. last turn's prompt and response.
        messages: the current conversation.
        renderer: the chat template.
        rewritten: also keep the tokens of answers that the template renders otherwise, such as without their thinking.

    Returns:
        ``ids_T`` and the added tokens; ``None`` if the tokens belong to another conversation, e.g. one of an episode
        that has ended.

    Raises:
        RewrittenAnswer: the template renders an answer otherwise than it was generated, and ``rewritten`` is not set.
    """
    known = list(ids_T)
    try:
        text = renderer.render(messages, add_generation_prompt=True)
    except ConfigError:
        return None
    segments = renderer.segments(messages)
    if segments is None:
        return None
    if len(segments) == 1:
        canonical = renderer.encode(text)
        same = known == canonical or len(set(decode_ids(renderer.tokenizer, [known, canonical]))) == 1
        return known if same else None
    first = renderer.encode(segments[0])
    if known[: len(first)] != first:
        return None
    special = special_ids(renderer.tokenizer) | renderer.turn_end_ids()
    gaps = _gaps(messages, segments, renderer, special)
    last = next(message for message in reversed(messages) if message["role"] == "assistant")
    walk = _Walk(known, text, gaps, special, renderer, last, rewritten)
    return walk.finish(*walk.pass_answers(len(first), len(segments[0]) if text.startswith(segments[0]) else None))


def _gaps(
    messages: Sequence[Mapping[str, Any]], segments: Sequence[str], renderer: ChatRenderer, special: frozenset[int]
) -> list[_Gap]:
    answers = [message for message in messages if message["role"] == "assistant"]
    gaps = []
    for answer, segment in zip(answers, segments[1:], strict=True):
        content = answer.get("content")
        ids = renderer.encode_after(content.strip() if isinstance(content, str) else "", segment)
        ends = next((i for i, token in enumerate(ids) if token in special), None)
        if ends is not None and renderer.tokenizer.decode(ids[:ends]).strip():
            ends = None  # there are words before the first special token
        gaps.append(_Gap(segment, ids, None if ends is None else ids[ends + 1 :]))
    return gaps


class _Walk:
    """Follows known tokens and the rendered text side by side, from answer to answer."""

    def __init__(
        self,
        known: list[int],
        text: str,
        gaps: list[_Gap],
        special: frozenset[int],
        renderer: ChatRenderer,
        last: Mapping[str, Any],
        rewritten: bool,
    ) -> None:
        self.known, self.text, self.gaps, self.special = known, text, gaps, special
        self.renderer, self.last, self.rewritten = renderer, last, rewritten

    def pass_answers(self, start: int, cursor: int | None) -> tuple[int, int | None] | tuple[None, None]:
        """Behind all answers but the last: the position in the tokens and in the text.

        The position in the text is ``None`` where the template renders an earlier part otherwise. Both are ``None`` if
        the tokens have another conversation.
        """
        for gap in self.gaps[:-1]:
            candidates = list(self._answers(start, gap))
            if not candidates:
                return None, None
            for answer, end in candidates:
                moved = None if cursor is None else self._find(answer, gap, cursor)
                if moved is not None:
                    start, cursor = end, moved
                    break
            else:
                start, cursor = candidates[0][1], None
        return start, cursor

    def _answers(self, start: int, gap: _Gap) -> Iterator[tuple[str, int]]:
        """Where the gap may be in the tokens: the answer before it as text, and the position behind it."""
        pattern = gap.ids if gap.rest is None else gap.rest
        if not pattern:
            return
        for at in range(start, len(self.known) - len(pattern) + 1):
            if self.known[at : at + len(pattern)] != pattern:
                continue
            ended = at > start and self.known[at - 1] in self.special
            if ended or gap.rest is None:
                yield self._decode(self.known[start : at - ended]), at + len(pattern)

    def _find(self, answer: str, gap: _Gap, cursor: int) -> int | None:
        """The position in the text behind an answer and a gap; ``None`` if they are not there."""
        start, answer = cursor, answer.strip()
        while not self.text.startswith(answer, start) and self.text[start : start + 1].isspace():
            start += 1
        if not self.text.startswith(answer, start):
            end = self.text.find(gap.text, cursor)
            return end + len(gap.text) if end >= 0 and self._are_same(answer, self.text[cursor:end]) else None
        end = start + len(answer)
        while not self.text.startswith(gap.text, end) and self.text[end : end + 1].isspace():
            end += 1
        return end + len(gap.text) if self.text.startswith(gap.text, end) else None

    def _are_same(self, answer: str, rendered: str) -> bool:
        """Whether two texts have the same tokens, with a tokenizer that changes text (lower-cases it, for example)."""
        encode, decode = self.renderer.encode, self._decode
        return decode(encode(answer.strip())).strip() == decode(encode(rendered.strip())).strip()

    def finish(self, start: int | None, cursor: int | None) -> list[int] | None:
        """The tokens and what follows the last answer."""
        if start is None:
            return None
        gap = self.gaps[-1]
        for answer, end in self._answers(start, gap):
            if end == len(self.known) and self._is_rendered(answer, cursor) is not None:
                return self.known  # the tokens are this prompt
        response = self.known[start:]
        ended = bool(response) and response[-1] in self.special and not self._is_said(response[-1])
        answer = self._decode(response[:-1] if ended else response)
        more = self._is_rendered(answer, cursor)
        if more is None:
            return self._keep_rewritten(answer, ended)
        if more and not ended:  # a stop string that is also the beginning of the gap
            before, rest = gap.text[: len(more)], gap.text[len(more) :]
            return [*self.known, *self.renderer.encode_after(before, rest)]
        return [*self.known, *self._rest(ended)]

    def _rest(self, ended: bool) -> list[int]:
        gap = self.gaps[-1]
        return gap.rest if ended and gap.rest is not None else gap.ids

    def _is_rendered(self, answer: str, cursor: int | None) -> str | None:
        """``""`` if the text has this last answer; what the answer has of the gap, if it ends with a part of it."""
        gap = self.gaps[-1].text
        if cursor is None or not self.text.endswith(gap) or cursor > len(self.text) - len(gap):
            return None
        rendered = self.text[cursor : len(self.text) - len(gap)].strip()
        if answer.strip() == rendered or self._are_same(answer, rendered):
            return ""
        more = answer.lstrip()[len(rendered) :] if answer.lstrip().startswith(rendered) else ""
        return more if more and gap.startswith(more) else None

    def _keep_rewritten(self, answer: str, ended: bool) -> list[int] | None:
        content = self.last.get("content")
        said = content.strip() if isinstance(content, str) else ""
        if self.last.get("tool_calls"):
            same = said in answer
        else:
            same = answer.strip().endswith(said[-_TAIL:]) if said else not answer.strip()
        if not same:
            return None
        if not self.rewritten:
            raise RewrittenAnswer
        return [*self.known, *self._rest(ended)]

    def _is_said(self, token: int) -> bool:
        """Whether the last answer itself ends with this special token."""
        content = self.last.get("content")
        return isinstance(content, str) and content.rstrip().endswith(self._decode([token]).strip())

    def _decode(self, ids: list[int]) -> str:
        return decode_ids(self.renderer.tokenizer, [ids])[0]
