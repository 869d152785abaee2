"""``/generate``: queues the sequences of a request, waits for them, and answers in one reply or as a stream."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from tests.fake_sglang.adapters import Adapters
from tests.fake_sglang.calls import BadRequest, Call, Reply
from tests.fake_sglang.locks import RequestLocks
from tests.fake_sglang.request_parsing import parse_sequences
from tests.fake_sglang.scheduler import Scheduler, ServerStopped
from tests.fake_sglang.sequences import Sequence
from tests.fake_sglang.settings import FakeSettings
from tests.fake_sglang.vocabulary import Vocabulary

__all__ = ["Generator"]


class Generator:
    """Answers ``/generate``.

    Args:
        settings: the server's settings.
        vocabulary: the model's tokens.
        locks: the pause guard and the update lock.
        scheduler: runs the sequences.
        adapters: the LoRA adapters a request may name.
    """

    def __init__(
        self,
        settings: FakeSettings,
        vocabulary: Vocabulary,
        locks: RequestLocks,
        scheduler: Scheduler,
        adapters: Adapters,
    ) -> None:
        self._settings = settings
        self._preferred = json.loads(settings.preferred_sampling_params or "{}")
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
            call,
            self._vocabulary,
            self._adapters,
            checks_names=self._scheduler.state.has_session,
            preferred=self._preferred,
        )
        if call.body.get("stream"):
            return Reply(stream=self._stream(call, sequences, is_list))
        with self._locks.for_request():
            self._require_adapters(sequences)
            self._submit(call, sequences)
            self._wait(call, sequences, lambda: all(s.finish_reason for s in sequences))
            replies = [self._reply(s) for s in sequences]
        return Reply(body=replies if is_list else replies[0])

    # ------------------------------------------------------------------ running

    def _require_adapters(self, sequences: list[Sequence]) -> None:
        """SGLang looks for a request's adapter after a pause, during which it may have been unloaded."""
        for sequence in sequences:
            if sequence.adapter is not None:
                self._adapters.require(sequence.adapter)

    def _submit(self, call: Call, sequences: list[Sequence]) -> None:
        def start() -> None:
            call.reach("scheduled")
            for sequence in sequences:
                if not sequence.prompt or not all(0 <= i < self._vocabulary.size for i in sequence.prompt):
                    call.lifecycle.die("a prompt is empty or holds a token id outside the vocabulary")
                fatal = sequence.sampling.max_new_tokens >= self._settings.lethal_new_tokens
                if fatal and self._settings.lethal_id in sequence.prompt:
                    call.lifecycle.die("a prompt holds the lethal token id")
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
        """One event whenever a sequence has enough new tokens or has ended."""
        unfinished = dict(enumerate(sequences))
        sent = [0] * len(sequences)

        def changed() -> list[int]:
            interval = self._settings.stream_interval
            return [i for i, s in unfinished.items() if s.finish_reason or len(s.output) >= sent[i] + interval]

        with self._locks.for_request():
            try:
                self._require_adapters(sequences)
            except BadRequest as refusal:  # the status 200 was sent already
                yield {"error": {**refusal.reply.body["error"], "code": refusal.reply.status}}
                return
            self._submit(call, sequences)
            while unfinished:
                self._wait(call, sequences, lambda: bool(changed()))
                events = []
                with self._scheduler.progress:
                    for i in changed():
                        start = sent[i] if self._settings.incremental_streaming_output else 0
                        events.append(self._event(sequences[i], start) | ({"index": i} if is_list else {}))
                        sent[i] = len(sequences[i].output)
                        if sequences[i].finish_reason:
                            del unfinished[i]
                yield from events

    def _event(self, sequence: Sequence, start: int) -> dict[str, Any]:
        """What a sequence has gained since it had ``start`` tokens."""
        whole = self._reply(sequence)
        meta = whole["meta_info"]
        for name in ("output_token_logprobs", "output_top_logprobs"):
            if name in meta:
                meta[name] = meta[name][start:]
        before = self._vocabulary.decode(list(sequence.output)[:start])
        return {"text": whole["text"][len(before) :], "output_ids": whole["output_ids"][start:], "meta_info": meta}

    def _reply(self, sequence: Sequence) -> dict[str, Any]:
        ids = list(sequence.output)
        reason = sequence.finish_reason or {}
        trimmed = ids[:-1] if reason.get("type") == "stop" and isinstance(reason.get("matched"), int) else ids
        text = self._vocabulary.decode(trimmed)
        if isinstance(reason.get("matched"), str):
            text = text[: text.index(reason["matched"])]
        meta = sequence.meta(self._scheduler.state.weight_version)
        return {"text": text, "output_ids": ids, "meta_info": meta}
