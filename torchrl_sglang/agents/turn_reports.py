"""Reports of a choice while it is generated: what each event of the server adds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torchrl_sglang.agents.conversation.progress import ProgressText
from torchrl_sglang.agents.conversation.template import AgentTemplate
from torchrl_sglang.agents.generated import Generated
from torchrl_sglang.agents.stop_strings import cut_at_stop
from torchrl_sglang.agents.types import OnProgress, Progress, TokenLogProb
from torchrl_sglang.protocol.stop_strings import StopStrings

__all__ = ["reporter", "top_log_probs"]


def reporter(
    index: int, text: ProgressText, stops: StopStrings, on_progress: OnProgress, template: AgentTemplate
) -> Callable[[Generated], None]:
    """The function that is called with a growing sequence, and reports what it has gained.

    Args:
        index: number of the choice.
        text: divides its text.
        stops: its stop strings.
        on_progress: called with the reports.
        template: whose tokenizer decodes the most likely tokens.
    """
    given = 0
    is_over = False

    def report(so_far: Generated) -> None:
        nonlocal given, is_over
        if is_over:
            return
        gained = text.push(so_far.output_ids)
        if text.is_stopped:  # what follows is told when it is known where the answer ends
            so_far, is_over = cut_at_stop(so_far, stops), True
        end = len(so_far.output_ids)
        if so_far.resumes and (stops.strings or stops.patterns) and not is_over:
            end = text.num_read  # in what was not read yet the answer may be cut off
        new = slice(given, end)
        given = max(given, end)
        on_progress(
            Progress(
                index=index,
                text=gained.text,
                content=gained.content,
                reasoning_content=gained.reasoning,
                token_ids=tuple(so_far.output_ids[new]),
                log_probs=tuple(so_far.log_probs[new]),
                top_log_probs=top_log_probs(so_far.top_log_probs[new], template),
            )
        )

    return report


def top_log_probs(entries_R: Sequence[Any], template: AgentTemplate) -> tuple[tuple[TokenLogProb, ...], ...]:
    """The most likely tokens of each token, from the server's ``[log_prob, id, text]``."""
    return tuple(
        tuple(
            TokenLogProb(token_id=token, text=template.decode([token]), log_prob=log_prob)
            for log_prob, token, _ in entries or ()
        )
        for entries in entries_R
    )
