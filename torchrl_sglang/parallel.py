"""Runs a few blocking calls in parallel and returns every result or error."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

from torchrl_sglang.errors import ConfigError, SGLangError

__all__ = ["Outcome", "Task", "failure_of", "side_by_side", "work_through"]

Result = TypeVar("Result")


class Outcome(Generic[Result]):
    """The result of one call: ``value`` if it returned, ``error`` if it raised one of this package's errors."""

    __slots__ = ("error", "value")

    def __init__(self, value: Result | None = None, error: SGLangError | None = None) -> None:
        self.value = value
        self.error = error

    def unwrap(self) -> Result:
        """Return the value, or raise the error."""
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]


class Task(Generic[Result]):
    """One call in a daemon thread, so that an interrupted program does not wait for a server that doesn't answer.

    A forked child does not have the thread: there nothing waits for it.

    Args:
        call: what to run.
        name: name of the thread.
        on_done: called in that thread when the call has ended.
    """

    def __init__(
        self, call: Callable[[], Result], *, name: str, on_done: Callable[[Task[Result]], None] | None = None
    ) -> None:
        self.name = name
        self._call = call
        self._on_done = on_done
        self._pid = os.getpid()
        self._finished = threading.Event()
        self._value: Result | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:  # noqa: BLE001  outcome() returns or raises it
            self._error = error
        finally:
            self._call = _nothing  # frees what the call refers to (a buffer, a process group)
            self._finished.set()
            if self._on_done is not None:
                self._on_done(self)

    @property
    def done(self) -> bool:
        """Whether the call has ended."""
        return self._finished.is_set()

    @property
    def runs_elsewhere(self) -> bool:
        """Whether it was running in the process that this one was forked from: its end does not show here."""
        return not self.done and self._pid != os.getpid()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the call to end; ``False`` if it still runs after ``timeout_s``, or in the parent of a fork."""
        return False if self.runs_elsewhere else self._finished.wait(timeout_s)

    def outcome(self) -> Outcome[Result]:
        """Wait for the call and return its outcome; raises an error that is not one of this package's.

        Raises:
            ConfigError: it was begun in the process that this one was forked from, which has the result.
        """
        if self.runs_elsewhere:
            raise ConfigError(
                f"{self.name} was begun in process {self._pid}, and this process {os.getpid()} was forked meanwhile: "
                "ask for the result there"
            )
        self._finished.wait()
        if self._error is None:
            return Outcome(value=self._value)
        if isinstance(self._error, SGLangError):
            return Outcome(error=self._error)
        raise self._error


def _nothing() -> Any:
    return None


def failure_of(call: Callable[[], object]) -> BaseException | None:
    """Run a call and return what it raised, whatever it is: for threads that must survive every error.

    Examples:
        >>> failure_of(lambda: 1 / 0)
        ZeroDivisionError('division by zero')
    """
    failure = None
    try:
        call()
    except BaseException as error:  # noqa: BLE001  returned
        failure = error
    return failure


def side_by_side(calls: Mapping[str, Callable[[], Result]]) -> dict[str, Outcome[Result]]:
    """Run named calls at the same time and wait for all of them.

    A single call runs in the caller's own thread, so that Ctrl-C interrupts it.

    Examples:
        >>> outcomes = side_by_side({"a": lambda: 1, "b": lambda: 2})
        >>> outcomes["b"].unwrap()
        2
    """
    if len(calls) == 1:
        ((name, call),) = calls.items()
        try:
            return {name: Outcome(value=call())}
        except SGLangError as error:
            return {name: Outcome(error=error)}
    tasks = {name: Task(call, name=f"sglang-{name}") for name, call in calls.items()}
    return {name: task.outcome() for name, task in tasks.items()}


def work_through(
    queues: Sequence[Sequence[Callable[[], Result]]], *, workers: int
) -> list[list[Outcome[Result] | None]]:
    """Run the calls of several queues, ``workers`` calls of each queue at the same time.

    After the first error no further call is started.

    Args:
        queues: calls, in the order in which they are started.
        workers: most calls of one queue that run at once.

    Returns:
        Per queue the outcome of each call; ``None`` for one that was not started.

    Examples:
        >>> outcomes = work_through([[lambda: 1, lambda: 2], [lambda: 3]], workers=1)
        >>> [[outcome.unwrap() for outcome in queue] for queue in outcomes]
        [[1, 2], [3]]
    """
    outcomes: list[list[Outcome[Result] | None]] = [[None] * len(queue) for queue in queues]
    lock, stopped = threading.Lock(), threading.Event()

    def work(queue: int, waiting: Iterator[tuple[int, Callable[[], Result]]]) -> None:
        while not stopped.is_set():
            with lock:
                index, call = next(waiting, (-1, None))
            if call is None:
                return
            try:
                outcomes[queue][index] = Outcome(value=call())
            except SGLangError as error:
                outcomes[queue][index] = Outcome(error=error)
                stopped.set()

    calls = {}
    for number, queue in enumerate(queues):
        waiting = iter(list(enumerate(queue)))
        calls.update({f"{number}-{i}": partial(work, number, waiting) for i in range(min(workers, len(queue)))})
    try:
        for outcome in side_by_side(calls).values():
            outcome.unwrap()
    finally:
        stopped.set()  # after Ctrl-C nothing more is sent
    return outcomes
