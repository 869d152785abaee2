"""The one worker thread of the fake server. As in SGLang, it runs control calls and decoding steps in order of arrival.

So a call that waits in a collective blocks generation and every later control call, and a queued call runs even if its
client has disconnected.
"""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

from tests.fake_sglang.sequences import PrefixCache, Sequence
from tests.fake_sglang.settings import FakeSettings
from tests.fake_sglang.state import ControlState

__all__ = ["Scheduler", "ServerStopped"]

T = TypeVar("T")
_PR_SET_NAME = 15


class ServerStopped(Exception):
    """The server ended while a request was in progress; the request's connection is closed without a reply."""


class Scheduler:
    """Runs control calls and decodes.

    Args:
        settings: the server's settings.
        state: the control state; only this thread writes to it.
        signature_of: signature of the weights used with an adapter name (or ``None``).
        vocab_size: number of token ids.
        eos_ids: token ids that end a sequence.
        decode_text: token ids to text, for stop strings.
        stopped: set when the server is stopped or killed.
        frozen: set when the server has frozen.
    """

    def __init__(
        self,
        settings: FakeSettings,
        state: ControlState,
        *,
        signature_of: Callable[[str | None], int],
        vocab_size: int,
        eos_ids: frozenset[int],
        decode_text: Callable[[list[int]], str],
        stopped: threading.Event,
        frozen: threading.Event,
    ) -> None:
        self._settings = settings
        self.state = state
        self._signature_of = signature_of
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._decode_text = decode_text
        self._stopped = stopped
        self._frozen = frozen
        self.cache = PrefixCache()
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.progress = threading.Condition()
        self.steps = 0
        self._commands: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._thread = threading.Thread(target=self._run, name="fake-scheduler", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def post(self, command: Callable[[], object]) -> None:
        """Queue a command and do not wait for it."""
        self._commands.put(command)

    def call(self, command: Callable[[], T]) -> T:
        """Queue a command, wait until it has run, and return its result.

        Raises:
            ServerStopped: the server ended first.
        """
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(command())
            except BaseException as error:  # noqa: BLE001  raised in the calling thread
                future.set_exception(error)

        self._commands.put(run)
        while not self._stopped.is_set():
            try:
                return future.result(timeout=0.2)
            except TimeoutError:
                if future.done():
                    raise
        raise ServerStopped

    # ------------------------------------------------------------------ commands of control calls; run on the thread

    def add(self, sequences: list[Sequence]) -> None:
        """Queue sequences for generation."""
        for sequence in sequences:
            sequence.initial_version = self.state.weight_version
        self.waiting += sequences

    def pause(self, mode: str) -> None:
        """Stop decoding. ``"retract"`` moves running sequences back to the queue, ``"in_place"`` keeps them."""
        self.state.engine = "retract" if mode == "retract" else "in_place"
        if mode == "retract":
            for sequence in self.running:
                sequence.states.clear()
                sequence.retractions += 1
            self.waiting, self.running = self.waiting + self.running, []

    def resume(self) -> None:
        """Continue decoding."""
        self.state.engine = "running"

    def abort(self, rid: str | None) -> None:
        """Abort one request, or all for ``None``: queued ones at once, running ones with their next token."""
        with self.progress:
            for sequence in [s for s in self.waiting if rid is None or s.rid == rid]:
                self.waiting.remove(sequence)
                sequence.was_queued_at_end = True
                sequence.finish_reason = {"type": "abort", "message": "Abort in waiting queue"}
            for sequence in self.running:
                if rid is None or sequence.rid == rid:
                    sequence.aborted = True
            self.progress.notify_all()

    def flush(self) -> bool:
        """Clear the prefix cache if :meth:`ControlState.may_flush`; returns whether it did."""
        allowed = self.state.may_flush(running=len(self.running), waiting=len(self.waiting))
        if allowed:
            self.cache.clear()
        return allowed

    # ------------------------------------------------------------------ the loop

    def _run(self) -> None:
        if self._settings.is_found:
            ctypes.CDLL(None).prctl(_PR_SET_NAME, b"sglang::scheduler")
        try:
            self._loop()
        finally:
            self._stopped.set()  # callers must not wait for a thread that has ended

    def _loop(self) -> None:
        while not self._stopped.is_set():
            busy = self.state.engine == "running" and bool(self.running or self.waiting)
            try:
                command = self._commands.get(timeout=0 if busy else 0.2)
            except queue.Empty:
                if busy and not self._frozen.is_set():
                    self._step()
                continue
            while self._frozen.is_set() and not self._stopped.wait(0.2):
                pass
            command()

    def _step(self) -> None:
        """One decoding step of the whole batch, after the prefill of new sequences."""
        if self._settings.step_s:
            time.sleep(self._settings.step_s)
        admitted, self.waiting = self.waiting, []
        with self.progress:
            for sequence in admitted:
                sequence.prefill(self.cache, self._signature_of(sequence.adapter), self._vocab_size)
            self.running += admitted
            for sequence in self.running:
                self._advance(sequence)
            for sequence in self.running:
                if sequence.finish_reason is not None:
                    tokens = sequence.prompt + sequence.output[:-1]
                    self.cache.insert(tokens, sequence.states)
            self.running = [s for s in self.running if s.finish_reason is None]
            self.steps += 1
            self.progress.notify_all()

    def _advance(self, sequence: Sequence) -> None:
        sampling = sequence.sampling
        if len(sequence.output) < sampling.max_new_tokens:
            signature = self._signature_of(sequence.adapter)
            sequence.decode(signature, self.state.weight_version, self._vocab_size, self._generator)
        sequence.finish_reason = self._finish_reason(sequence)

    def _finish_reason(self, sequence: Sequence) -> dict[str, object] | None:
        sampling = sequence.sampling
        if sequence.aborted:
            return {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
        if len(sequence.output) >= sampling.max_new_tokens:
            return {"type": "length", "length": len(sequence.output)}
        last = sequence.output[-1]
        if not sampling.ignore_eos and (last in sampling.stop_token_ids or last in self._eos_ids):
            return {"type": "stop", "matched": last}
        if sampling.stop:
            text = self._decode_text(sequence.output)
            for stop in sampling.stop:
                if stop in text:
                    return {"type": "stop", "matched": stop}
        return None
