"""``/generate``: queues the sequences of a request, waits for them, and answers in one reply or as a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from tests.fake_sglang.adapters import Adapters
from tests.fake_sglang.calls import Call, Reply
from tests.fake_sglang.locks import RequestLocks
from tests.fake_sglang.request_parsing import parse_sequences
from tests.fake_sglang.scheduler import Scheduler, ServerStopped
from tests.fake_sglang.sequences import Sequence
from tests.fake_sglang.vocabulary import Vocabulary

__all__ = ["Generator"]


class Generator:
    """Answers ``/generate``.

    Args:
        vocabulary: the model's tokens.
        locks: the pause guard and the update lock.
        scheduler: runs the sequences.
        adapters: the LoRA adapters a request may name.
    """

    def __init__(self, vocabulary: Vocabulary, locks: RequestLocks, scheduler: Scheduler, adapters: Adapters) -> None:
        self._vocabulary = vocabulary
        self._locks = locks
        self._scheduler = scheduler
        self._adapters = adapters

    def __call__(self, call: Call) -> Reply:
        """Generate, score or stream.

        Raises:
            BadRequest: the request is invalid.
            ServerStopped: the server ended. As in SGLang, a token id outside the vocabulary ends it, and so does an
                empty prompt in a batch.
        """
        sequences, is_list = parse_sequences(
            call, self._vocabulary, self._adapters, checks_names=self._scheduler.state.has_session
        )
        if call.body.get("stream"):
            return Reply(stream=self._stream(call, sequences, is_list))
        with self._locks.for_request():
            self._submit(call, sequences)
            self._wait(call, sequences, lambda: all(s.finish_reason for s in sequences))
            replies = [self._reply(s) for s in sequences]
        return Reply(body=replies if is_list else replies[0])

    # ------------------------------------------------------------------ running

    def _submit(self, call: Call, sequences: list[Sequence]) -> None:
        def start() -> None:
            call.reach("scheduled")
            for sequence in sequences:
                if not sequence.prompt or not all(0 <= i < self._vocabulary.size for i in sequence.prompt):
                    call.lifecycle.die("a prompt is empty or holds a token id outside the vocabulary")
            self._scheduler.add(sequences)

        self._scheduler.call(start)

    def _wait(self, call: Call, sequences: list[Sequence], done: Callable[[], bool]) -> None:
        """Wait until ``done``. If the client disconnects, its sequences are aborted, as in SGLang."""
        progress = self._scheduler.progress
        while True:
            with progress:
                if progress.wait_for(done, timeout=0.2):
                    return
            if call.lifecycle.stopped.is_set():
                raise ServerStopped
            if not call.connected():
                for sequence in sequences:
                    self._scheduler.post(partial(self._scheduler.abort, sequence.rid))
                raise ServerStopped

    def _stream(self, call: Call, sequences: list[Sequence], is_list: bool) -> Iterator[dict[str, Any]]:
        """One event whenever a sequence has new tokens or has ended; each holds all tokens so far."""
        unfinished = dict(enumerate(sequences))
        sent = [0] * len(sequences)

        def changed() -> list[int]:
            return [i for i, s in unfinished.items() if s.finish_reason or len(s.output) > sent[i]]

        with self._locks.for_request():
            self._submit(call, sequences)
            while unfinished:
                self._wait(call, sequences, lambda: bool(changed()))
                events = []
                with self._scheduler.progress:
                    for i in changed():
                        events.append(self._reply(sequences[i]) | ({"index": i} if is_list else {}))
                        sent[i] = len(sequences[i].output)
                        if sequences[i].finish_reason:
                            del unfinished[i]
                yield from events

    def _reply(self, sequence: Sequence) -> dict[str, Any]:
        ids = list(sequence.output)
        reason = sequence.finish_reason or {}
        trimmed = ids[:-1] if reason.get("type") == "stop" and isinstance(reason.get("matched"), int) else ids
        text = self._vocabulary.decode(trimmed)
        if isinstance(reason.get("matched"), str):
            text = text[: text.index(reason["matched"])]
        meta = sequence.meta(self._scheduler.state.weight_version)
        return {"text": text, "output_ids": ids, "meta_info": meta}
