"""``StreamedPart``: the part of a sequence that a stream brings; an event costs what it adds, not what was before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchrl_sglang.agents.generated import Generated
from torchrl_sglang.errors import ProtocolError
from torchrl_sglang.protocol.generate import parse_one
from torchrl_sglang.protocol.stream_events import refuse_errors

__all__ = ["StreamedPart"]

_LOG_PROBS, _TOP = "output_token_logprobs", "output_top_logprobs"


class StreamedPart:
    """The events of one stream, which have all tokens so far, or only what is new.

    Which kind they are is read from them, as :class:`~torchrl_sglang.protocol.stream_events.StreamedReply` does.

    Args:
        done: the sequence before this part.
        server: base URL of the server.

    Attributes:
        so_far: the sequence with what has come; it grows in place.

    Examples:
        >>> part = StreamedPart(Generated(output_ids=[5], log_probs=[-0.1]), server="http://host")
        >>> meta = {"completion_tokens": 2, "finish_reason": None, "output_token_logprobs": [[-0.5, 6], [-0.2, 7]]}
        >>> part.add({"output_ids": [6, 7], "meta_info": meta}), part.so_far.output_ids
        (None, [5, 6, 7])
    """

    def __init__(self, done: Generated, *, server: str) -> None:
        self._server = server
        self._before, self._tops_before = len(done.output_ids), len(done.top_log_probs)
        self._meta: dict[str, Any] = {}
        self._has_top = False
        self.so_far = Generated(
            output_ids=[*done.output_ids],
            log_probs=[*done.log_probs],
            versions=[*done.versions],
            top_log_probs=[*done.top_log_probs],
            finish_reason="length",
            cached_tokens=done.cached_tokens,
            server=server,
            resumes=done.resumes,
            prompt_ids=done.prompt_ids,
        )

    def add(self, event: Mapping[str, Any]) -> dict[str, Any] | None:
        """Add the next event.

        Returns:
            The whole part once it is finished, in the form of an answer that is not streamed; else ``None``.

        Raises:
            RequestRejectedError: the server ended the stream with an error.
            ProtocolError: a field is missing, or the event neither repeats nor continues the tokens before it.
        """
        refuse_errors(event, server=self._server)
        try:
            ids_R, meta = event["output_ids"], event["meta_info"]
            count = int(meta.get("completion_tokens", len(ids_R)))
            is_finished = meta.get("finish_reason") is not None
            known = len(self.so_far.output_ids) - self._before
            start = self._start(ids_R, count, known)
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(
                f"{self._server} streamed an event that is not what SGLang promises: {str(event)[:200]}",
                server=self._server,
            ) from error
        self._meta.update(meta)
        if is_finished and start == known:  # it has the whole part
            return {**event, "meta_info": self._meta}
        self._extend(ids_R[start:], meta, start)
        return self._whole(event) if is_finished else None

    def _start(self, ids_R: Any, count: int, known: int) -> int:
        """Index of the first of an event's tokens that is new; ``known`` if the event has all tokens so far."""
        if not known or len(ids_R) >= count:
            return known
        # The event that aborts a waiting sequence repeats its last token, and has all text and log-probs (0.5.23).
        if count == known and ids_R and ids_R == self.so_far.output_ids[-len(ids_R) :]:
            return len(ids_R)
        if known + len(ids_R) != count:
            raise ProtocolError(
                f"{self._server} streamed {len(ids_R)} tokens after {known}, but counts {count}: part of the stream is "
                "lost",
                server=self._server,
            )
        return 0

    def _extend(self, new_R: list[int], meta: Mapping[str, Any], start: int) -> None:
        if not new_R:
            return
        lists = {name: meta[name][start:] for name in (_LOG_PROBS, _TOP) if isinstance(meta.get(name), list)}
        reply = parse_one({"output_ids": new_R, "meta_info": {"finish_reason": None, **lists}}, server=self._server)
        self.so_far.output_ids += reply.output_ids
        self.so_far.log_probs += reply.output_logprobs or ()
        if _TOP in lists:
            self._has_top = True
            self.so_far.top_log_probs += lists[_TOP]
        if not self._before and not self.so_far.resumes:
            self.so_far.cached_tokens = int(meta.get("cached_tokens") or 0)

    def _whole(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """The part from events of which each had only what was new."""
        so_far = self.so_far
        meta = {**self._meta, _LOG_PROBS: [(value,) for value in so_far.log_probs[self._before :]]}
        if self._has_top:
            meta[_TOP] = so_far.top_log_probs[self._tops_before :]
        return {**event, "output_ids": so_far.output_ids[self._before :], "meta_info": meta}
