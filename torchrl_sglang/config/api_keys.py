"""API keys of servers: made, checked, and read from files, since everyone on a machine can read a command line."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from torchrl_sglang.config.checking import require
from torchrl_sglang.errors import ConfigError

__all__ = ["check_keys", "new_key", "read_key"]


def new_key() -> str:
    """A random key of 256 bits.

    Examples:
        >>> len(new_key()), new_key() == new_key()
        (64, False)
    """
    return secrets.token_hex(32)  # letters and digits: means the same in a shell, in YAML and in a header


def read_key(path: str | Path) -> str:
    """The key in a file, without surrounding white space.

    Raises:
        ConfigError: the file can't be read, is no text, or is empty.
    """
    try:
        key = Path(path).expanduser().read_text().strip()
    except OSError as error:
        raise ConfigError(f"the key file {path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ConfigError(f"the key file {path} is no text") from None  # the error shows some of its bytes
    require(bool(key), f"the key file {path} is empty")
    return key


def check_keys(config: Any, *, may_be_open: bool = False) -> None:
    """Check the fields ``api_key`` and ``admin_api_key`` of a settings record, and read them from their files.

    Afterwards the record holds the keys and not the files' names: a copy in another process, or on another machine,
    needs no file.

    Args:
        config: the record.
        may_be_open: whether ``api_key`` may be ``False``.

    Raises:
        ConfigError: a key that no HTTP header can hold, or a key beside a file; no key is shown.
    """
    for name in ("api_key", "admin_api_key"):
        path = getattr(config, f"{name}_file")
        if path is not None:
            require(getattr(config, name) is None, f"give {name} or {name}_file, not both")
            require(isinstance(path, (str, Path)), f"{name}_file must be a path, got a {type(path).__name__}")
            object.__setattr__(config, name, read_key(path))
            object.__setattr__(config, f"{name}_file", None)
        key = getattr(config, name)
        if key is None or (key is False and may_be_open and name == "api_key"):
            continue
        # YAML makes a number of a key of digits, and of "yes" a boolean.
        require(isinstance(key, str), f"{name} must be a string, got a {type(key).__name__} (in YAML: use quotes)")
        require(
            key.isascii() and key.isprintable() and " " not in key and bool(key) and not key.startswith("-"),
            f"{name} must not be empty, start with '-' or hold white space or anything but printable ASCII",
        )
