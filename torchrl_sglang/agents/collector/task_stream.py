"""The tasks of a collector, numbered, in an order that can be resumed."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, default_collate

from torchrl_sglang.config.checking import require_number
from torchrl_sglang.errors import ConfigError

__all__ = ["NumberedTask", "TaskStream"]


class NumberedTask(NamedTuple):
    """A task, and its number since the beginning."""

    number: int
    task: Any


class TaskStream:
    """Tasks one after the other. What was taken and not delivered is taken again after a resume.

    Args:
        tasks: any iterable. A sequence can be shuffled.
        epochs: passes over ``tasks``; ``None`` never ends.

    Raises:
        ConfigError: ``tasks`` is no iterable of tasks, is empty, or can't be iterated more than once and should.

    Examples:
        >>> stream = TaskStream(["a", "b"], epochs=2)
        >>> [stream.take().task for _ in range(4)], stream.take()
        (['a', 'b', 'a', 'b'], None)
    """

    def __init__(self, tasks: Iterable[Any], *, epochs: int | None = 1) -> None:
        kind = type(tasks).__name__
        if isinstance(tasks, (str, bytes)) or (not hasattr(tasks, "__iter__") and not _is_sequence(tasks)):
            raise ConfigError(f"tasks must be an iterable of tasks, such as a list, got {kind}")
        if isinstance(tasks, Mapping) or hasattr(tasks, "columns"):
            raise ConfigError(
                f"tasks is a {kind}, whose items are columns, no tasks: give its rows (a DataFrame's "
                "df.to_dict('records'), a TensorDict's td.unbind(0), one part of a DatasetDict)"
            )
        if isinstance(tasks, DataLoader) and tasks.batch_size is not None and tasks.collate_fn is default_collate:
            raise ConfigError(
                f"tasks is a DataLoader of batches of {tasks.batch_size}, and a batch is no task: make it with "
                "batch_size=None"
            )
        require_number("epochs", epochs, optional=True, whole=True, at_least=1)
        if _is_sequence(tasks) and len(tasks) == 0:  # type: ignore[arg-type]
            raise ConfigError("tasks is empty: there is nothing to run agents on")
        if epochs != 1 and not _is_sequence(tasks) and iter(tasks) is tasks:
            raise ConfigError(
                f"tasks is an iterator, which can be iterated once, and epochs={epochs}: give a list, or an endless "
                "iterator with epochs=1"
            )
        self._tasks = tasks
        self._epochs = epochs
        self._seed: int | None = None
        self._next = 0
        self._again: list[int] = []
        self._open: set[int] = set()
        self._source: Iterator[Any] | None = None
        self._at = 0

    @property
    def has_started(self) -> bool:
        """Whether a task was taken."""
        return self._source is not None

    @property
    def has_given(self) -> bool:
        """Whether there was a task, now or before a resume."""
        return self._next > 0

    @property
    def _length(self) -> int | None:
        """Number of tasks of a pass, where it is known."""
        return len(self._tasks) if _is_sequence(self._tasks) else None  # type: ignore[arg-type]

    def seed(self, seed: int) -> None:
        """Shuffle each pass in an order that the seed determines; only a sequence can be shuffled.

        Raises:
            ConfigError: a task was taken already, or a state of another seed was loaded.
        """
        if self.has_started:
            raise ConfigError("set_seed() determines the order of tasks: call it before the first batch")
        if self._next > 0 and seed != self._seed:
            raise ConfigError(
                f"set_seed({seed}) would change the order of tasks in the middle of them: the state that was loaded "
                f"has seed {self._seed}. Leave set_seed out after load_state_dict"
            )
        self._seed = seed

    def take(self) -> NumberedTask | None:
        """The next task; ``None`` if there is none."""
        number = self._again[0] if self._again else self._next
        task = self._read(number)
        if task is None:
            return None
        self._open.add(number)  # first: the state may be read meanwhile
        if self._again:
            self._again.pop(0)
        else:
            self._next += 1
        return task

    def done(self, number: int) -> None:
        """A task needs no further run: its group was delivered, or replaced."""
        self._open.discard(number)

    def state_dict(self) -> dict[str, Any]:
        """Which tasks are still to be run."""
        following = self._next  # read first: what is taken meanwhile, in the thread of the agents, is not taken twice
        again = sorted(number for number in self._open | set(self._again) if number < following)
        return {"next": following, "again": again, "seed": self._seed, "length": self._length}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a stream of the same tasks was.

        Raises:
            ConfigError: a task was taken already, or the state is that of more or fewer tasks.
        """
        if self.has_started:
            raise ConfigError("load_state_dict() sets which task comes next: call it before the first batch")
        if state.get("length") not in (None, self._length):
            raise ConfigError(
                f"the state is that of {state['length']} tasks, and there are {self._length}: the numbers in it mean "
                "other tasks here. Resume with the same tasks"
            )
        self._next, self._again, self._seed = state["next"], list(state["again"]), state["seed"]

    def _read(self, number: int) -> NumberedTask | None:
        if self._source is None:
            self._source = self._numbered()
        for task in self._source:
            if task.number == number:
                return task
        return None

    def _numbered(self) -> Iterator[NumberedTask]:
        number = epoch = 0
        while self._epochs is None or epoch < self._epochs:
            first = number
            for task in self._one_pass(epoch):
                yield NumberedTask(number, task)
                number += 1
            if number == first:  # empty
                return
            epoch += 1

    def _one_pass(self, epoch: int) -> Iterator[Any]:
        if not _is_sequence(self._tasks):
            return iter(self._tasks)
        places = list(range(len(self._tasks)))  # type: ignore[arg-type]
        if self._seed is not None:
            random.Random(f"{self._seed}-{epoch}").shuffle(places)
        return (self._tasks[place] for place in places)  # type: ignore[index]


def _is_sequence(tasks: Any) -> bool:
    """Also data sets with ``__len__`` and ``__getitem__``."""
    return isinstance(tasks, Sequence) or (hasattr(tasks, "__len__") and hasattr(tasks, "__getitem__"))
