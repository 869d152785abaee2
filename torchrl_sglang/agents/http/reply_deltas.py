"""``ReplyDeltas``: what each choice of a turn has gained since the last report; the deltas joined are the answer."""

from __future__ import annotations

from torchrl_sglang.agents.types import Choice, Progress

__all__ = ["Delta", "ReplyDeltas"]


Delta = Progress
"""What a choice has gained."""


class _Sent:
    """How much of a choice was sent: characters of each text, and tokens."""

    __slots__ = ("content", "reasoning_content", "text", "tokens")

    def __init__(self) -> None:
        self.content = self.reasoning_content = self.text = self.tokens = 0


class ReplyDeltas:
    """Counts what was sent of each choice.

    Examples:
        >>> deltas = ReplyDeltas()
        >>> deltas.of(Progress(index=0, content="He", token_ids=(5,))).content
        'He'
        >>> message = {"role": "assistant", "content": "Hello"}
        >>> whole = dict(text="Hello", token_ids=(5, 6), log_probs=(-0.5, -0.1), weight_versions=(3, 3))
        >>> rest = deltas.rest(Choice(index=0, message=message, finish_reason="stop", **whole))
        >>> rest.content, rest.token_ids
        ('llo', (6,))
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
        sent = self._sent.setdefault(progress.index, _Sent())
        sent.content += len(progress.content)
        sent.reasoning_content += len(progress.reasoning_content)
        sent.text += len(progress.text)
        sent.tokens += len(progress.token_ids)
        return progress

    def rest(self, choice: Choice) -> Delta:
        """What a finished choice has that was not reported."""
        sent, message = self._sent.setdefault(choice.index, _Sent()), choice.message
        content = message.get("content") or ""
        return self.of(
            Progress(
                index=choice.index,
                content=content[sent.content :],
                reasoning_content=(message.get("reasoning_content") or "")[sent.reasoning_content :],
                text=content[sent.text :],  # of a completion: its text, as the reports have it
                token_ids=choice.token_ids[sent.tokens :],
                log_probs=choice.log_probs[sent.tokens :],
                top_log_probs=choice.top_log_probs[sent.tokens :],
            )
        )
