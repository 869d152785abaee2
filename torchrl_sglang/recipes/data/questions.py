"""An endless, seeded stream of questions that can start at any position."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, IterableDataset

from torchrl_sglang.config.checking import require, require_number

__all__ = ["POSITION_KEY", "Question", "QuestionStream"]

POSITION_KEY = "position"
"""Key of a batch's question numbers (int64, one per sequence)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question and its reference answer.

    Attributes:
        query: the user message.
        answer: the reference answer that the reward function compares with.
    """

    query: str
    answer: str


class QuestionStream(IterableDataset[dict[str, str | int]]):
    """Yields question number 0, 1, 2, ... without end; each pass over the questions has its own seeded order.

    Question ``i`` depends on the seed alone, so a resumed run continues with the same questions. Each item has its
    number under ``"position"``: the trainer knows which questions it has trained on, also when batches are generated
    ahead.

    Args:
        questions: at least one.
        seed: seed of the order; ``None`` keeps the given order.
        start: number of the first question.

    Raises:
        ConfigError: there are no questions, or ``start`` is negative.

    Examples:
        >>> stream = QuestionStream([Question(query=c, answer="") for c in "abc"], seed=0)
        >>> whole = [stream.at(i).query for i in range(6)]
        >>> sorted(whole[:3]) == sorted(whole[3:]) == ["a", "b", "c"]
        True
        >>> later = QuestionStream(stream.questions, seed=0, start=4)
        >>> next(iter(later))["query"] == whole[4]
        True
    """

    def __init__(self, questions: Sequence[Question], *, seed: int | None, start: int = 0) -> None:
        super().__init__()
        require(len(questions) > 0, "there are no questions")
        require_number("start", start, whole=True, at_least=0)
        self.questions = tuple(questions)
        self.start = start
        self._seed = seed
        self._pass_number = -1
        self._order: list[int] = []

    def at(self, number: int) -> Question:
        """Return question ``number``."""
        pass_number, place = divmod(number, len(self.questions))
        if self._seed is None:
            return self.questions[place]
        if pass_number != self._pass_number:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + pass_number)
            self._order = torch.randperm(len(self.questions), generator=generator).tolist()
            self._pass_number = pass_number
        return self.questions[self._order[place]]

    def __iter__(self) -> Iterator[dict[str, str | int]]:
        for number in itertools.count(self.start):
            question = self.at(number)
            yield {"query": question.query, "answer": question.answer, POSITION_KEY: number}

    def loader(self, batch_size: int) -> DataLoader[dict[str, str | int]]:
        """Make a data loader over the stream."""
        return DataLoader(self, batch_size=batch_size)
