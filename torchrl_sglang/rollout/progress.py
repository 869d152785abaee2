"""Tokens done and tokens per second, shown while a batch runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

__all__ = ["token_progress"]


@contextmanager
def token_progress(enabled: bool, most_tokens: int) -> Iterator[Callable[[int], None] | None]:
    """A bar that counts tokens up to ``most_tokens``; yields what to call with new tokens, ``None`` when not enabled.

    Examples:
        >>> with token_progress(False, 100) as progress:
        ...     progress is None
        True
    """
    if not enabled:
        yield None
        return
    with tqdm(total=most_tokens, unit="tok", desc="generating", leave=False, dynamic_ncols=True) as bar:
        yield bar.update
