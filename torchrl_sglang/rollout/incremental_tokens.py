"""The next turn's prompt from the last turn's tokens, so that generated text is not tokenized again.

Tokenizing the whole conversation in every turn may give other tokens than those the model generated: then the prefix
cache misses, and a trainer learns from tokens that were never sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchrl.data.llm import History

__all__ = ["continue_tokens"]

_TAIL = 32  # last characters of an answer, by which it is found in the decoded tokens
_MARK = "@@the-answer@@"


def continue_tokens(
    ids_T: list[int], rendered: str, tokenizer: Any, *, history: History, render: Callable[[History], str]
) -> list[int] | None:
    """Extend the tokens of an earlier state of a conversation by what was added since.

    The decoded tokens decide between two cases. If the rendered conversation starts with them, the rest is tokenized
    and appended. If the template rewrites earlier turns (some drop the thinking of past answers), the tokens must end
    with the assistant's last answer, and the text after that answer is tokenized and appended.

    Args:
        ids_T: tokens of the earlier state, e.g. last turn's prompt and response.
        rendered: the current conversation as text, with the generation prompt.
        tokenizer: a Hugging Face tokenizer.
        history: the current conversation.
        render: renders a conversation without a generation prompt.

    Returns:
        ``ids_T`` and the added tokens; ``None`` if the tokens belong to another conversation, e.g. one of an episode
        that has ended.
    """
    decoded = tokenizer.decode(ids_T, skip_special_tokens=False)
    if rendered.startswith(decoded):
        rest: str | None = rendered[len(decoded) :]
    else:
        rest = _after_last_answer(decoded, rendered, history, render)
    if rest is None:
        return None
    return [*ids_T, *tokenizer(rest, add_special_tokens=False)["input_ids"]] if rest else ids_T


def _after_last_answer(decoded: str, rendered: str, history: History, render: Callable[[History], str]) -> str | None:
    messages = list(history.unbind(0))
    last = next((i for i in reversed(range(len(messages))) if messages[i].role == "assistant"), None)
    if not last:  # no answer, or an answer without a question before it
        return None
    until_answer = render(history[: last + 1])
    if not rendered.startswith(until_answer):
        return None
    # What the template writes after an answer: the text behind a marker that is rendered as an answer.
    marked = render(history[:last].append(History(role="assistant", content=_MARK), inplace=False, dim=-1))
    closing = marked.rpartition(_MARK)[2]
    tail = str(messages[last].content).rstrip()[-_TAIL:]
    for kept in range(len(closing), -1, -1):  # how much of the closing text the tokens already have
        if decoded.endswith(tail + closing[:kept]):
            return closing[kept:] + rendered[len(until_answer) :]
    return None
