"""``LoopThread``: the event loop in which agents run, in a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import traceback
from concurrent.futures import CancelledError, wait
from typing import Any

from torchrl_sglang.agents.collector.groups import Groups
from torchrl_sglang.config.checking import require
from torchrl_sglang.errors import ConfigError

__all__ = ["LoopThread"]

_log = logging.getLogger(__name__)

_STOP_S = 30.0
_LOOK_AGAIN_S = 1.0
_BLOCKED_S = 5.0
"""Without a step of the event loop. Its own steps take milliseconds, also on a busy machine."""


class LoopThread:
    """An event loop in a daemon thread, in which the agents run: neither the gateway nor the trainer waits for them."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._loop = asyncio.new_event_loop()
        self._is_stopped = False
        self._stepped_at = time.monotonic()
        self._has_warned = False
        self._thread = threading.Thread(target=self._run, name="agent-collector", daemon=True)
        self._thread.start()

    def call(self, work: Any) -> Any:
        """Run an async function in the loop, and return its result.

        Raises:
            ConfigError: the collector was shut down.
        """
        require(not self._is_stopped, "the collector was shut down: make a new one")
        waiting = asyncio.run_coroutine_threadsafe(work(), self._loop)
        try:
            while not waiting.done() and self._thread.is_alive():
                wait({waiting}, timeout=_LOOK_AGAIN_S)
                self._look_for_block()
            if not waiting.done():
                raise CancelledError
            return waiting.result()
        except CancelledError as error:
            raise ConfigError("the collector was shut down while a batch was waited for") from error
        finally:
            waiting.cancel()  # after Ctrl-C

    def _look_for_block(self) -> None:
        """Warn once if something blocks the loop: no agent goes on meanwhile, and no time limit ends one."""
        blocked_s = time.monotonic() - self._stepped_at
        if self._has_warned or blocked_s < _BLOCKED_S or not self._thread.is_alive():
            return
        self._has_warned = True
        frame = sys._current_frames().get(self._thread.ident or 0)
        last = traceback.extract_stack(frame)[-1] if frame is not None else None
        where = "" if last is None else f" (now in {last.filename}, line {last.lineno}, {last.name})"
        _log.warning(
            "the agents' event loop has been blocked for %.0f s%s: no other agent runs meanwhile, and timeout_s ends "
            "none. An async run_agent must await its model, its tools and its sleep (AsyncOpenAI, asyncio.to_thread); "
            "a plain function has a thread of its own. The iterator of tasks runs there, too",
            blocked_s,
            where,
        )

    def _step(self) -> None:
        self._stepped_at = time.monotonic()
        self._loop.call_later(_LOOK_AGAIN_S, self._step)

    def stop(self, timeout_s: float | None = None) -> None:
        """End the agents, then the thread."""
        if self._is_stopped:
            return
        self._is_stopped = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP_S if timeout_s is None else min(timeout_s, threading.TIMEOUT_MAX))

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._step()
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(self._groups.close())
            for task in asyncio.all_tasks(self._loop):  # someone who waits for a batch
                task.cancel()
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()
