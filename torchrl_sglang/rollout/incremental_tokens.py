"""The next turn's prompt from the tokens of the last one: nothing that has been generated is tokenized again.

A conversation rendered and tokenized anew every turn may come out as other tokens than the model generated: the prefix
cache misses, and a trainer learns on tokens that were never sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchrl.data.llm import History

__all__ = ["continue_tokens"]

_TAIL = 32  # characters by which the end of an answer is recognised
_MARK = "@@the-answer@@"


def continue_tokens(
    ids_T: list[int], rendered: str, tokenizer: Any, *, history: History, render: Callable[[History], str]
) -> list[int] | None:
    """Extend the tokens of a conversation by what the conversation has gained since they were made.

    Two cases are told apart by text alone. The rendered conversation starts with what the tokens spell: the rest is
    tokenized and appended. Or the template rewrites earlier turns (some drop the thinking of past answers): then the
    tokens must end with the last answer of the assistant, and what comes after it is appended.

    Args:
        ids_T: tokens of an earlier state of the conversation, e.g. last turn's prompt and response.
        rendered: the conversation now, as text, with the generation prompt.
        tokenizer: a Hugging Face tokenizer.
        history: the conversation now.
        render: renders a conversation without a generation prompt.

    Returns:
        ``ids_T`` and what was added; ``None`` if the tokens are not of this conversation, as those of an episode that
        has ended.
    """
    spelled = tokenizer.decode(ids_T, skip_special_tokens=False)
    if rendered.startswith(spelled):
        rest: str | None = rendered[len(spelled) :]
    else:
        rest = _after_last_answer(spelled, rendered, history, render)
    if rest is None:
        return None
    return [*ids_T, *tokenizer(rest, add_special_tokens=False)["input_ids"]] if rest else ids_T


def _after_last_answer(spelled: str, rendered: str, history: History, render: Callable[[History], str]) -> str | None:
    messages = list(history.unbind(0))
    last = next((i for i in reversed(range(len(messages))) if messages[i].role == "assistant"), None)
    if not last:  # nobody has answered, or nobody was asked
        return None
    until_answer = render(history[: last + 1])
    if not rendered.startswith(until_answer):
        return None
    # What the template writes after an answer, read off an answer that can be found again in the text.
    marked = render(history[:last].append(History(role="assistant", content=_MARK), inplace=False, dim=-1))
    closing = marked.rpartition(_MARK)[2]
    tail = str(messages[last].content).rstrip()[-_TAIL:]
    for kept in range(len(closing), -1, -1):  # how much of the end of the message the tokens hold already
        if spelled.endswith(tail + closing[:kept]):
            return closing[kept:] + rendered[len(until_answer) :]
    return None
