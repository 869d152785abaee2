"""Events of a streamed ``/generate``, put together to whole replies.

SGLang's events are cumulative: each has all tokens so far. Under ``--incremental-streaming-output`` each has only what
is new. Which kind a stream has is read from its events: ``completion_tokens`` counts all tokens in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchrl_sglang.errors import ProtocolError, RequestRejectedError

__all__ = ["StreamedReply", "refuse_errors"]

# These lists of `meta_info` have one entry per response token. Others, such as the prompt's log-probs, are whole.
_PER_TOKEN = (
    *("output_token_logprobs", "output_top_logprobs", "output_token_ids_logprobs"),
    *("output_token_sampling_mask", "output_token_sampling_logprobs"),
)


class StreamedReply:
    """One sequence of a stream.

    Args:
        server: base URL of the server, for errors.

    Examples:
        >>> reply = StreamedReply("http://host")
        >>> meta = {"finish_reason": None}
        >>> _ = reply.add({"text": "a", "output_ids": [5], "meta_info": {**meta, "completion_tokens": 1}})
        >>> event = reply.add({"text": "b", "output_ids": [6], "meta_info": {**meta, "completion_tokens": 2}})
        >>> event["text"], event["output_ids"]
        ('ab', [5, 6])
    """

    def __init__(self, server: str) -> None:
        self._server = server
        self._whole: dict[str, Any] = {}

    @property
    def is_finished(self) -> bool:
        """Whether the last event has been added."""
        return bool(self._whole) and self._whole["meta_info"].get("finish_reason") is not None

    def add(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """Add the next event.

        Returns:
            The sequence so far, in the form of a cumulative event.

        Raises:
            RequestRejectedError: the server ended the stream with an error.
            ProtocolError: a field is missing, or the event neither repeats nor continues the tokens before it.
        """
        refuse_errors(event, server=self._server)
        try:
            ids_T, meta = list(event["output_ids"]), dict(event["meta_info"])
            count = int(meta.get("completion_tokens", len(ids_T)))
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(
                f"{self._server} streamed an event that is not what SGLang promises: {str(event)[:200]}",
                server=self._server,
            ) from error
        before_T = self._whole.get("output_ids", [])
        whole = dict(event)
        if before_T and len(ids_T) < count:
            # The event that aborts a waiting sequence repeats its last token, and has all text and log-probs (0.5.23).
            repeats = bool(ids_T) and count == len(before_T) and ids_T == before_T[-len(ids_T) :]
            new_T = [] if repeats else ids_T
            if len(before_T) + len(new_T) != count:
                raise ProtocolError(
                    f"{self._server} streamed {len(ids_T)} tokens after {len(before_T)}, but counts {count}: part of "
                    "the stream is lost",
                    server=self._server,
                )
            whole["output_ids"] = [*before_T, *new_T]
            text = self._whole.get("text") or ""
            whole["text"] = max(text, event.get("text") or "", key=len) if repeats else text + (event.get("text") or "")
            earlier = self._whole["meta_info"]
            for name in _PER_TOKEN:
                if name in earlier or name in meta:
                    meta[name] = [*(earlier.get(name) or ()), *(() if repeats else meta.get(name) or ())]
        # Fields that only some events have, such as the prompt's log-probs, stay.
        whole["meta_info"] = {**self._whole.get("meta_info", {}), **meta}
        self._whole = whole
        return whole


def refuse_errors(event: Mapping[str, Any], *, server: str) -> None:
    """Refuse an event that is an error, as which one in the middle of a stream comes: the status 200 was sent.

    Raises:
        RequestRejectedError: the server ended the stream with an error.
        ProtocolError: the event is no object.
    """
    if not isinstance(event, Mapping):
        raise ProtocolError(f"{server} streamed an event that is no object", server=server)
    error = event.get("error") if "meta_info" not in event else None
    if "meta_info" not in event:
        detail = str(error.get("message", error) if isinstance(error, Mapping) else error or dict(event))
        status = int(error["code"]) if isinstance(error, Mapping) and str(error.get("code")).isdigit() else 200
        raise RequestRejectedError(
            f"{server} stopped the stream: {detail}", server=server, status=status, detail=detail
        )
    finish = event["meta_info"].get("finish_reason") if isinstance(event["meta_info"], Mapping) else None
    if not isinstance(finish, Mapping) or finish.get("type") != "abort":
        return
    code = finish.get("status_code")
    if isinstance(code, int) and code >= 400:
        detail = str(finish.get("message", ""))
        raise RequestRejectedError(
            f"{server} answered {code} in the stream: {detail}",
            server=server,
            status=code,
            detail=detail,
        )
