"""``/classify``: token ids in, the outputs of a reward model's head out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchrl_sglang.errors import ProtocolError
from torchrl_sglang.protocol.messages import HttpRequest

__all__ = ["build_scores", "parse_scores"]


def build_scores(ids_B_T: Sequence[Sequence[int]]) -> HttpRequest:
    """Request the scores of a batch of texts.

    ``/v1/score`` is something else: it compares the probabilities of given labels as the next token of a *generative*
    model.

    Args:
        ids_B_T: token ids of each text.

    Examples:
        >>> build_scores([[1, 2], [3]]).body
        {'input_ids': [[1, 2], [3]]}
    """
    body = {"input_ids": [list(ids_T) for ids_T in ids_B_T]}
    return HttpRequest(method="POST", path="/classify", body=body, timeout="generate", repeatable=True)


def parse_scores(answer: Any, *, num_expected: int, server: str) -> list[list[float]]:
    """Read the answer to :func:`build_scores`.

    Returns:
        For each text the outputs of the model's head, one per label.

    Raises:
        ProtocolError: the answer is not ``num_expected`` lists of numbers.

    Examples:
        >>> parse_scores([{"embedding": [0.5], "meta_info": {}}], num_expected=1, server="http://host")
        [[0.5]]
    """
    items = answer if isinstance(answer, list) else [answer]
    try:
        scores_BL = [[float(value) for value in item["embedding"]] for item in items]
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(
            f"{server} answered /classify without scores: {str(answer)[:200]}", server=server
        ) from error
    if len(scores_BL) != num_expected or not all(scores_BL):
        raise ProtocolError(
            f"{server} answered {len(scores_BL)} scores where {num_expected} were requested; none is used",
            server=server,
        )
    return scores_BL
