"""``EarlierResponses``: what ``previous_response_id`` and ``item_reference`` name."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torchrl_sglang.agents.http.api_errors import ApiError

__all__ = ["EarlierResponses"]

_MOST_KEPT = 256
"""Answers per session; each holds references to the messages before it, which the session has in any case."""


class EarlierResponses:
    """Keeps the messages of each session's answers while the session lives."""

    def __init__(self) -> None:
        self._kept: weakref.WeakKeyDictionary[Any, OrderedDict[str, list[Mapping[str, Any]]]] = (
            weakref.WeakKeyDictionary()
        )
        self._items: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()

    def messages(self, session: Any, body: Any) -> list[Mapping[str, Any]]:
        """The messages before those of a request; empty if it names no earlier answer.

        Raises:
            ApiError: there is no such answer.
        """
        name = body.get("previous_response_id") if isinstance(body, Mapping) else None
        if name is None:
            return []
        kept = self._kept.get(session, OrderedDict())
        if not isinstance(name, str) or name not in kept:
            raise ApiError(
                404,
                f"there is no earlier response {name!r:.80} in this session: send the whole input",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        return kept[name]

    def items(self, session: Any) -> Mapping[str, Any]:
        """The items of a session's answers, by their ids, for ``item_reference``."""
        return self._items.get(session, {})

    def add(
        self,
        session: Any,
        name: str,
        messages: Sequence[Mapping[str, Any]],
        items: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        """Keep an answer.

        Args:
            session: the session.
            name: id of the answer.
            messages: of the conversation, itself included.
            items: its own.
        """
        self._items.setdefault(session, {}).update((item["id"], item) for item in items)
        kept = self._kept.setdefault(session, OrderedDict())
        kept[name] = list(messages)
        if len(kept) > _MOST_KEPT:
            kept.popitem(last=False)
