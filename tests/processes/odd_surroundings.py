"""A trainer in odd surroundings: `unshare -m python odd_surroundings.py URL CHECKPOINT FOLDER`, as root.

It mounts what it needs, for itself alone, and prints one JSON object: per case the transport that ``auto`` has chosen
for the server at ``URL``, which is outside, or for one of its own (``own: ...``), and the reason.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tests.fake_sglang import FakeServer, FakeSettings
from tests.fake_sglang.model import read_checkpoint
from torchrl_sglang import SyncConfig, WeightSync
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool

SHARED_MEMORY = "/dev/shm"
DEVICES = ("null", "zero", "random", "urandom", "tty")


def run(*command: str) -> None:
    subprocess.run(command, check=True)


@contextmanager
def mounted(target: str, *options: str, source: str = "tmpfs") -> Iterator[None]:
    run("mount", *options, source, target)
    try:
        yield
    finally:
        run("umount", "--lazy", target)


@contextmanager
def remounted(option: str) -> Iterator[None]:
    """``/dev/shm``, the same that others see, with an option for this process alone."""
    with mounted(SHARED_MEMORY, "--bind", source=SHARED_MEMORY):
        run("mount", "-o", f"remount,bind,{option}", SHARED_MEMORY)
        yield


@contextmanager
def no_shared_memory(folder: Path) -> Iterator[None]:
    """A ``/dev`` without ``shm``."""
    devices = folder / "dev"
    devices.mkdir()
    for name in DEVICES:
        (devices / name).touch()
        run("mount", "--bind", f"/dev/{name}", str(devices / name))
    with mounted("/dev", "--rbind", source=str(devices)):
        yield


@contextmanager
def temporary_folder(path: str) -> Iterator[None]:
    """``TMPDIR`` leads elsewhere."""
    before, os.environ["TMPDIR"], tempfile.tempdir = os.environ.get("TMPDIR"), path, path
    try:
        yield
    finally:
        os.environ.pop("TMPDIR")
        tempfile.tempdir = None
        if before is not None:
            os.environ["TMPDIR"] = before


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def pushed(url: str, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Push twice; the second push must be like the first."""
    sync = WeightSync(SGLangPool([SGLangClient(url)]), SyncConfig(bucket_bytes=60_000, verify="full", stage="off"))
    transports = set()
    for addend in (1, 2):
        report = sync.push({name: tensor + addend for name, tensor in tensors.items()})
        assert report is not None
        assert report.num_checksums > 0
        transports.add(report.transport)
    (transport,) = transports
    reason = sync.transport_choices[url].reason
    sync.close()
    return {"transport": transport, "reason": reason}


def main(url: str, checkpoint: str, folder: str) -> None:
    tensors = read_checkpoint(checkpoint)
    found: dict[str, dict[str, str]] = {}
    private = Path(folder) / "private"
    private.mkdir()

    def outside(name: str, surroundings: Callable[[], object]) -> None:
        with surroundings():  # type: ignore[attr-defined]
            found[name] = pushed(url, tensors)

    outside("as it is", lambda: temporary_folder("/tmp"))
    outside("another /dev/shm", lambda: mounted(SHARED_MEMORY, "-t", "tmpfs"))
    outside("read-only", lambda: remounted("ro"))
    outside("no programs from it", lambda: remounted("noexec"))
    outside("none", lambda: no_shared_memory(Path(folder)))
    with mounted(str(private), "-t", "tmpfs"):
        outside("another TMPDIR", lambda: temporary_folder(str(private)))
    outside("a TMPDIR that is not there", lambda: temporary_folder("/nonexistent"))
    outside("a long TMPDIR", lambda: temporary_folder("/tmp/" + "x" * 150))

    def own(name: str, surroundings: Callable[[], object], limit: Callable[[], object]) -> None:
        with surroundings():  # type: ignore[attr-defined]
            server = FakeServer(FakeSettings(model_path=Path(checkpoint), is_found=True))
            with server, limit():  # type: ignore[attr-defined]
                found[f"own: {name}"] = pushed(server.url, tensors)

    plain: Callable[[], object] = lambda: temporary_folder("/tmp")  # noqa: E731
    own("room", lambda: mounted(SHARED_MEMORY, "-t", "tmpfs"), plain)
    own("too small", lambda: mounted(SHARED_MEMORY, "-t", "tmpfs", "-o", "size=64k"), plain)
    own("too few files", lambda: mounted(SHARED_MEMORY, "-t", "tmpfs", "-o", "nr_inodes=4"), plain)
    own("files too large", plain, lambda: largest_file(50_000))
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
