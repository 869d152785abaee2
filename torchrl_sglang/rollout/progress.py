"""A progress bar of generated tokens and tokens per second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

__all__ = ["token_progress"]


@contextmanager
def token_progress(enabled: bool, max_tokens: int) -> Iterator[Callable[[int], None] | None]:
    """Show a bar up to ``max_tokens``; yields the function that counts new tokens, ``None`` when not enabled.

    Examples:
        >>> with token_progress(False, 100) as progress:
        ...     progress is None
        True
    """
    if not enabled:
        yield None
        return
    with tqdm(total=max_tokens, unit="tok", desc="generating", leave=False, dynamic_ncols=True) as bar:
        yield bar.update
