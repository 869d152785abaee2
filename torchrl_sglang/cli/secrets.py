"""Reads keys from files: everyone on the machine can read a command line."""

from __future__ import annotations

from pathlib import Path

from torchrl_sglang.errors import ConfigError

__all__ = ["key_from"]


def key_from(path: Path | None) -> str | None:
    """The key in a file, without surrounding white space; ``None`` if ``path`` is ``None``.

    Raises:
        ConfigError: the file can't be read, or is empty.
    """
    if path is None:
        return None
    try:
        key = path.expanduser().read_text().strip()
    except OSError as error:
        raise ConfigError(f"the key file {path} can't be read: {error.strerror}") from error
    if not key:
        raise ConfigError(f"the key file {path} is empty")
    return key
