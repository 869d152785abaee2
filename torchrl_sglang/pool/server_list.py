"""Lists of servers that something else keeps up to date: a file, a DNS name, or a function."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from torchrl_sglang.errors import ConfigError, ServerError, StorageError
from torchrl_sglang.server_url import base_url

__all__ = ["ListSource", "read_server_file", "reader_of", "server_file_locked", "write_server_file"]

ListSource = Path | str | Callable[[], Iterable[str]]
"""A file with a URL per line, a DNS name with a port (``"dns://servers.example:30000"``), or a function."""

_SETTLE_S = 0.2
_SETTLE_LIMIT_S = 5.0
_DNS = re.compile(r"dns://(?P<host>[^/:]+|\[[0-9a-fA-F:]+\]):(?P<port>[0-9]{1,5})/?")


def reader_of(source: ListSource) -> Callable[[], list[str]]:
    """A function that reads the list anew each time; URLs come as clients use them, each once.

    Args:
        source: where the list is.

    Raises:
        ConfigError: it is none of the known kinds. The reader itself raises :class:`ServerError`.

    Examples:
        >>> reader_of(lambda: ["a:30000", "http://b:30000/", "http://a:30000"])()
        ['http://a:30000', 'http://b:30000']
    """
    if callable(source):
        return lambda: _checked(_called(source))
    if isinstance(source, str) and source.startswith("dns:"):
        found = _DNS.fullmatch(source)
        if found is None or not 0 < int(found["port"]) < 65536:
            raise ConfigError(f"{source!r} is no DNS name with a port: write dns://HOST:PORT")
        return lambda: _resolve(found["host"].strip("[]"), int(found["port"]))
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise ConfigError(f"{source!r} is one server, not a list: engine.add({source!r})")
    if isinstance(source, (str, Path)):
        if not str(source):
            raise ConfigError("the name of the file with the list of servers is empty")
        path = Path(source)
        return _SettledFile(path)
    raise ConfigError(
        "a list of servers is a file with a URL per line, dns://HOST:PORT, or a function that returns URLs, got "
        f"{type(source).__name__}"
    )


def read_server_file(path: Path) -> list[str]:
    """The URLs in a file, one per line. Empty lines, and what follows a ``#``, are left out.

    Raises:
        ServerError: the file can't be read, or a line is no URL.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe might wait for ever
            raise OSError("it is no regular file")
        text = path.read_text(encoding="utf-8-sig")  # with or without the mark that some editors write
    except (OSError, UnicodeDecodeError) as error:
        raise ServerError(f"the list of servers {path} can't be read: {error}") from error
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return _checked(line for line in lines if line)


class _SettledFile:
    """Reads a file that somebody may be writing: a list without its last lines would remove servers.

    A file that has changed is read when it has stayed the same for a moment. Its time stamps are compared with each
    other alone: its file server's clock, and this machine's, may be wrong and jump.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._settled: tuple[int, int, int] | None = None

    def __call__(self) -> list[str]:
        """The URLs.

        Raises:
            ServerError: as :func:`read_server_file`, or it keeps changing.
        """
        deadline = time.monotonic() + _SETTLE_LIMIT_S
        while time.monotonic() < deadline:
            before = _stamp(self._path)
            if before is None or before != self._settled:
                time.sleep(_SETTLE_S)
            urls = read_server_file(self._path)
            if _stamp(self._path) == before:
                self._settled = before
                return urls
        raise ServerError(f"the list of servers {self._path} is being written all the time")


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def write_server_file(path: Path, urls: Sequence[str]) -> None:
    """Replace such a file; a reader sees either the old or the new list. Links to it and its permissions stay.

    Raises:
        StorageError: it can't be written; the old one stays.
    """
    target = path.resolve()
    new = target.with_name(f".{target.name}.{uuid.uuid4().hex}.new")
    try:
        try:
            new.write_text("".join(f"{url}\n" for url in urls))
            if target.exists():
                new.chmod(stat.S_IMODE(target.stat().st_mode))
            new.replace(target)
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"the list of servers {path} can't be written: {error}", path=str(path)) from error


@contextlib.contextmanager
def server_file_locked(path: Path) -> Iterator[None]:
    """Nobody else who asks for this lock changes a file of this folder during the block.

    The lock is one of the folder, so that nothing is left behind. Where the file system has none, there is no lock.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder = os.open(path.resolve().parent, os.O_RDONLY)
            stack.callback(os.close, folder)
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield


def _called(source: Callable[[], Iterable[str]]) -> list[str]:
    failure: BaseException
    try:
        found = source()
        if not isinstance(found, str):
            return list(found)
        raise TypeError("it returned a string, not a list of URLs")
    except BaseException as error:  # noqa: BLE001  whatever the user's function raises, the thread that calls it goes on
        failure = error
    if not isinstance(failure, Exception):  # Ctrl-C
        raise failure
    text = f"{type(failure).__name__}: {failure}"
    raise ServerError(f"the function that lists the servers failed: {text}") from failure


def _checked(urls: Iterable[str]) -> list[str]:
    try:
        return list(dict.fromkeys(base_url(url) for url in urls))
    except ConfigError as error:
        raise ServerError(f"the list of servers has an entry that is no URL: {error}") from error


def _resolve(host: str, port: int) -> list[str]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ServerError(f"the name {host!r} can't be resolved: {error}") from error
    addresses = sorted({str(address[0]) for *_, address in found})
    # With both families each server has two addresses, and would be two members.
    addresses = [each for each in addresses if ":" not in each] or addresses
    return [f"http://[{each}]:{port}" if ":" in each else f"http://{each}:{port}" for each in addresses]
