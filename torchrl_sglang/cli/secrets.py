"""Keys come from files: words on a command line can be read by everyone on the machine."""

from __future__ import annotations

from pathlib import Path

from torchrl_sglang.errors import ConfigError

__all__ = ["key_from"]


def key_from(path: Path | None) -> str | None:
    """The key in a file, without white space around it; ``None`` without a file."""
    if path is None:
        return None
    try:
        key = path.expanduser().read_text().strip()
    except OSError as error:
        raise ConfigError(f"the key file {path} can't be read: {error.strerror}") from error
    if not key:
        raise ConfigError(f"the key file {path} is empty")
    return key
