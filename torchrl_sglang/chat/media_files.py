"""Local files with images, videos and sounds: which may be read, and their bytes."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from torchrl_sglang.errors import ConfigError

__all__ = ["MediaKind", "check_roots", "read_media_file"]

MediaKind = Literal["image", "video", "audio"]


def check_roots(roots: Any) -> tuple[Path, ...]:
    """Folders from which the messages of a conversation may name files, with links resolved.

    Raises:
        ConfigError: one is no folder.
    """
    if isinstance(roots, (str, Path)):
        raise ConfigError(f"media_roots must be a list of folders, also for one; got {roots!r}")
    found = []
    for root in roots:
        folder = Path(root).expanduser()
        if not folder.is_dir():
            raise ConfigError(f"media_roots has {str(root)!r}, which is no folder on this machine")
        found.append(folder.resolve())
    return tuple(found)


def read_media_file(path: str | Path, kind: MediaKind, roots: Sequence[Path] | None) -> bytes:
    """The bytes of a file.

    Args:
        path: a path or ``file://`` URL.
        kind: what is expected in it, for error messages.
        roots: the folders, resolved, in one of which it must lie once links are followed; ``None`` reads any file.

    Raises:
        ConfigError: it lies elsewhere, is no regular file, or can't be read.
    """
    name = f"the {kind} {str(path)!r:.200}"
    if roots is not None and not roots:
        raise ConfigError(
            f"{name} is a local file in a message, and no folder is open to messages, which may come from a model or a "
            f"dataset. Open one with SGLangChat(..., media_roots=[FOLDER]), or pass the file as {kind}s=[...]"
        )
    try:
        file = _local_path(path, name)
        file = (file.expanduser() if roots is None else file).resolve(strict=True)
        if roots is not None and not any(file.is_relative_to(root) for root in roots):
            raise ConfigError(
                f"{name} lies outside of the folders that are open to messages: media_roots="
                f"{[str(root) for root in roots]}"
            )
        if not stat.S_ISREG(file.stat().st_mode):
            raise ConfigError(f"{name} is no regular file")
        return file.read_bytes()
    except (OSError, RuntimeError) as error:  # a RuntimeError is a loop of links, or a home folder that is not known
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{name} can't be read ({reason}); give a path, a URL or bytes") from error
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{name} can't be read ({error}); give a path, a URL or bytes") from error


def _local_path(path: str | Path, name: str) -> Path:
    text = str(path)
    if text[:5].lower() != "file:":
        if isinstance(path, str) and "://" in text:
            raise ConfigError(f"{name} has a scheme that is not supported: http, https, file and data are")
        return Path(path)
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise ConfigError(f"{name} is no URL of a file on this machine: file:///absolute/path")
    return Path(unquote(parts.path))
