"""``ReplyDeltas``: what each choice of a turn has gained since the last report; the deltas joined are the answer."""

from __future__ import annotations

from dataclasses import dataclass

from torchrl_sglang.agents.types import Choice, Progress, TokenLogProb

__all__ = ["Delta", "ReplyDeltas"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What a choice has gained.

    Attributes:
        index: number of the choice.
        content: new text of the message.
        reasoning_content: new text of the reasoning.
        text: new text of a completion without messages.
        token_ids: new tokens.
        log_probs: their log-probs.
        top_log_probs: the likeliest tokens for each of them; empty unless requested.
    """

    index: int
    content: str = ""
    reasoning_content: str = ""
    text: str = ""
    token_ids: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()
    top_log_probs: tuple[tuple[TokenLogProb, ...], ...] = ()


class _Sent:
    """How much of a choice was sent: characters of each text, and tokens."""

    __slots__ = ("content", "reasoning_content", "text", "tokens")

    def __init__(self) -> None:
        self.content = self.reasoning_content = self.text = self.tokens = 0


class ReplyDeltas:
    """Keeps what was sent of each choice.

    Examples:
        >>> deltas = ReplyDeltas()
        >>> so_far = dict(index=0, reasoning_content="", token_ids=(), log_probs=())
        >>> [deltas.of(Progress(text=t, content=t, **so_far)).content for t in ("He", "Hello")]
        ['He', 'llo']
    """

    def __init__(self) -> None:
        self._sent: dict[int, _Sent] = {}

    def is_new(self, index: int) -> bool:
        """Whether nothing of this choice was reported yet; true once."""
        if index in self._sent:
            return False
        self._sent[index] = _Sent()
        return True

    def of(self, progress: Progress) -> Delta:
        """What a choice has gained with this report."""
        return self._advance(
            progress.index,
            progress.content,
            progress.reasoning_content,
            progress.text,
            progress.token_ids,
            progress.log_probs,
            progress.top_log_probs,
        )

    def rest(self, choice: Choice) -> Delta:
        """What a finished choice has that was not reported."""
        message = choice.message
        return self._advance(
            choice.index,
            message.get("content") or "",
            message.get("reasoning_content") or "",
            message.get("content") or "",  # of a completion: its text, as the reports have it
            choice.token_ids,
            choice.log_probs,
            choice.top_log_probs,
        )

    def _advance(
        self,
        index: int,
        content: str,
        reasoning: str,
        text: str,
        token_ids: tuple[int, ...],
        log_probs: tuple[float, ...],
        top: tuple[tuple[TokenLogProb, ...], ...],
    ) -> Delta:
        sent = self._sent.setdefault(index, _Sent())
        delta = Delta(
            index=index,
            content=content[sent.content :],
            reasoning_content=reasoning[sent.reasoning_content :],
            text=text[sent.text :],
            token_ids=token_ids[sent.tokens :],
            log_probs=log_probs[sent.tokens :],
            top_log_probs=top[sent.tokens :],
        )
        sent.content = max(sent.content, len(content))
        sent.reasoning_content = max(sent.reasoning_content, len(reasoning))
        sent.text = max(sent.text, len(text))
        sent.tokens = max(sent.tokens, len(token_ids))
        return delta
