"""Shows on standard error what a long operation is doing."""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TextIO

__all__ = ["PhaseLine", "shown_progress"]

_ELAPSED = re.compile(r"(, \d+ %)?(, \d+ s)?$")


class PhaseLine:
    r"""One line that changes on a terminal; elsewhere (a log file, a pipe) one line per phase and no carriage return.

    Pass it as ``progress`` to whatever takes such a callback. A phase is the text without the percentage and the
    seconds at its end, so ``"loading the weights, 3 s"`` and ``"loading the weights, 50 %, 4 s"`` are one phase.

    Args:
        prefix: put before every text.
        stream: where to write; ``None`` is standard error.

    Examples:
        >>> import io
        >>> log = io.StringIO()
        >>> with PhaseLine(stream=log) as show:
        ...     for text in ("loading, 1 s", "loading, 2 s", "warming up, 3 s"):
        ...         show(text)
        >>> log.getvalue()
        'loading\nwarming up\n'
    """

    def __init__(self, prefix: str = "", *, stream: TextIO | None = None) -> None:
        self._prefix = prefix
        self._stream = sys.stderr if stream is None else stream
        self._shown: set[str] = set()
        self._width = 0

    def __call__(self, text: str) -> None:
        """Show a line of text; only its first line is used."""
        line = self._prefix + text.strip().partition("\n")[0]
        if self._stream.isatty():
            line = line[: max(10, shutil.get_terminal_size().columns - 1)]
            self._stream.write(f"\r{line:<{self._width}}")
            self._width = len(line)
        else:
            phase = _ELAPSED.sub("", line)
            if phase in self._shown:
                return
            self._shown.add(phase)
            self._stream.write(f"{phase}\n")
        self._stream.flush()

    def clear(self) -> None:
        """Remove the line from a terminal, so that other output can follow."""
        if self._width:
            self._stream.write(f"\r{'':<{self._width}}\r")
            self._stream.flush()
            self._width = 0

    def __enter__(self) -> PhaseLine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.clear()


@contextlib.contextmanager
def shown_progress(progress: Callable[[str], None] | bool | None) -> Iterator[Callable[[str], None] | None]:
    """What to call with lines of text during this block.

    Args:
        progress: a callback, used as it is; ``True`` shows the lines on standard error, ``False`` shows nothing,
            ``None`` shows them on a terminal.
    """
    if callable(progress):
        yield progress
    elif progress or (progress is None and sys.stderr.isatty()):
        with PhaseLine() as show:
            yield show
    else:
        yield None
