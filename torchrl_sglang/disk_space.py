"""Writing files on a disk that may be full: the error says what was missing, and nothing incomplete stays."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchrl_sglang.errors import SGLangError, StorageError

__all__ = ["free_bytes", "writing"]

# What torch and safetensors say in errors of their own when a write fails.
_FAILED_WRITES = ("PytorchStreamWriter failed", "unexpected pos", "No space left", "I/O error", "os error")

# Those that a write or the making of a folder ends with; a missing file is the caller's own fault.
_ERRNOS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE}
    | {errno.ENOTDIR, errno.ENAMETOOLONG}
)


@contextmanager
def writing(
    path: Path,
    what: str,
    *,
    incomplete: Path | None = None,
    needed_bytes: int | None = None,
    remains: str = "",
) -> Iterator[None]:
    """Translate failed writes inside the block, having removed what they left.

    Args:
        path: what is written.
        what: its name in the message, such as ``"the checkpoint"``.
        incomplete: file or folder that holds it until it is complete; removed on any exception.
        needed_bytes: its size, if known.
        remains: a sentence that says what there is instead.

    Raises:
        StorageError: a write failed.

    Examples:
        >>> with writing(Path("/dev/full"), "the table"):
        ...     _ = Path("/dev/full").write_text("x")
        Traceback (most recent call last):
        torchrl_sglang.errors.StorageError: the table could not be written to /dev/full: No space left on device...
    """
    try:
        yield
    except BaseException as error:
        if incomplete is not None:
            _remove(incomplete)
        failure = _failed_write(error)
        if failure is None:
            raise
        number, reason = failure
        free = free_bytes(path)
        sentences = [f"{what} could not be written to {path}: {reason}."]
        if needed_bytes is not None:
            sentences.append(f"It takes {_size(needed_bytes)}.")
        if free is not None:
            sentences.append(f"{_size(free)} are free on that disk.")
        if number == errno.ENOSPC or (number is None and "space" in reason):
            sentences.append("Make room there, or write to another disk.")
        translated = StorageError(
            " ".join([*sentences, *filter(None, [remains])]),
            path=str(path),
            needed_bytes=needed_bytes,
            free_bytes=free,
        )
        translated.errno = number
        raise translated from error


def free_bytes(path: Path) -> int | None:
    """What is free on the disk of a path, also of one that does not exist yet; ``None`` if that can't be told."""
    for folder in (path, *path.absolute().parents):
        try:
            return shutil.disk_usage(folder).free
        except FileNotFoundError:
            continue
        except OSError:
            return None
    return None


def _failed_write(error: BaseException) -> tuple[int | None, str] | None:
    """Number and words of the failed write behind an exception; ``None`` if it is of another kind."""
    if isinstance(error, SGLangError):
        return None
    if isinstance(error, OSError):
        return (error.errno, str(error.strerror)) if error.errno in _ERRNOS else None
    text = str(error)
    if not isinstance(error, Exception) or not any(words in text for words in _FAILED_WRITES):
        return None
    cause = error.__cause__ or error.__context__
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _ERRNOS:
            return cause.errno, str(cause.strerror)
        cause = cause.__cause__ or cause.__context__
    return None, text.splitlines()[0][:200]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _size(num_bytes: int) -> str:
    """A number of bytes for people.

    Examples:
        >>> _size(1_300_000_000), _size(0)
        ('1.3 GB', '0 MB')
    """
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.3g} MB"
