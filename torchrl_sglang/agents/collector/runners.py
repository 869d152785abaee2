"""The forms of ``run_agent`` as one: something to await that returns a reward."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from torchrl_sglang.agents.collector.commands import CommandAgent
from torchrl_sglang.agents.collector.failures import RunFailedError
from torchrl_sglang.agents.collector.rewards import NoReward, Reward, read_returned
from torchrl_sglang.errors import ConfigError

__all__ = ["Returned", "RunAgent", "Runner", "in_own_thread", "make_runner"]

RunAgent = Callable[[Any, str, str], Any] | str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""``(task, base_url, api_key) -> reward``, plain or async, or a command line."""

Returned = Reward | NoReward | None
Runner = Callable[[Any, str, str], Awaitable[Returned]]


def make_runner(run_agent: RunAgent) -> Runner:
    """Make a runner of a function, an async function, or a command line.

    Raises:
        ConfigError: it is none of these, or the function takes other arguments.
    """
    if isinstance(run_agent, (str, list, tuple, os.PathLike)):
        return CommandAgent([run_agent] if isinstance(run_agent, os.PathLike) else run_agent)
    if not callable(run_agent):
        raise ConfigError(
            "run_agent must be a function (task, base_url, api_key) -> reward, or a command line, got "
            f"{type(run_agent).__name__}"
        )
    agent: Callable[..., Any] = run_agent
    by_name = _takes_names(agent)
    if _is(inspect.isgeneratorfunction, run_agent) or _is(inspect.isasyncgenfunction, run_agent):
        raise ConfigError("run_agent has a `yield`, so calling it runs nothing: an agent must return its reward")

    def call(task: Any, base_url: str, api_key: str) -> Any:
        if by_name:
            return agent(task=task, base_url=base_url, api_key=api_key)
        return agent(task, base_url, api_key)

    if _is(inspect.iscoroutinefunction, run_agent):

        async def run_async(task: Any, base_url: str, api_key: str) -> Reward | None:
            return read_returned(await _without_exit(call(task, base_url, api_key)))

        return run_async

    async def run_in_thread(task: Any, base_url: str, api_key: str) -> Reward | None:
        returned = await in_own_thread(call, task, base_url, api_key)
        if inspect.isawaitable(returned):  # a lambda that calls an async function
            returned = await _without_exit(returned)
        return read_returned(returned)

    return run_in_thread


def _is(kind: Callable[[Any], bool], run_agent: Callable[..., Any]) -> bool:
    """Whether a function, or what an object does when it is called, is of a kind; also behind ``functools.partial``."""
    while isinstance(run_agent, functools.partial):
        run_agent = run_agent.func
    return kind(run_agent) or kind(type(run_agent).__call__)


def _takes_names(run_agent: Callable[..., Any]) -> bool:
    """Whether the function is called with the arguments' names: it has them all, in any order.

    Raises:
        ConfigError: it takes other arguments.
    """
    try:
        signature = inspect.signature(run_agent)
    except (TypeError, ValueError):  # some built-in functions have none
        return False
    named = [p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if {"task", "base_url", "api_key"} <= set(named):
        try:
            signature.bind(task="task", base_url="base_url", api_key="api_key")
        except TypeError as error:
            raise ConfigError(f"run_agent is called as run_agent(task, base_url, api_key): {error}") from error
        return True
    try:
        signature.bind("task", "base_url", "api_key")
    except TypeError as error:
        raise ConfigError(
            f"run_agent is called as run_agent(task, base_url, api_key), and takes {signature}: {error}"
        ) from error
    return False


async def _without_exit(work: Awaitable[Any]) -> Any:
    """The result; ``sys.exit`` in an agent is an error of the agent, not the end of the event loop."""
    try:
        return await work
    except (SystemExit, KeyboardInterrupt) as error:
        raise RunFailedError("error", f"the agent raised {type(error).__name__}({error})") from error


async def in_own_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a daemon thread of its own: a function that never returns holds up nothing but itself.

    Raises:
        RunFailedError: it raised what a future can't hold: ``SystemExit``, or the ``StopIteration`` of a ``next()``.
    """
    loop = asyncio.get_running_loop()
    result: asyncio.Future[Any] = loop.create_future()

    def settle(value: Any, error: BaseException | None) -> None:
        if result.done():  # the run was given up
            return
        if error is None:
            result.set_result(value)
        elif isinstance(error, Exception) and not isinstance(error, StopIteration):
            result.set_exception(error)
        else:
            result.set_exception(RunFailedError("error", f"it raised {type(error).__name__}({error})"))

    def work() -> None:
        value, error = None, None
        try:
            value = function(*arguments)
        except BaseException as raised:  # noqa: BLE001  the run's result says it
            error = raised
        try:
            loop.call_soon_threadsafe(settle, value, error)
        except RuntimeError:  # the loop is closed: the collector was shut down
            return

    threading.Thread(target=work, name="agent", daemon=True).start()
    return await result
