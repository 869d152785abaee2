"""Linux namespaces for a program: no network, no other processes, no files but Python's own.

Used by ``python_runner.py``, and imports only the standard library. Root enters the namespaces by its own rights, and
the program then runs as ``nobody``; any other user enters a user namespace first. There is no ``/proc`` inside.
"""

import ctypes
import errno
import os
import platform
import struct
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

_NEW_MOUNTS, _NEW_UTS, _NEW_IPC, _NEW_USER, _NEW_PIDS, _NEW_NET = (
    0x00020000,
    0x04000000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
_ALL = _NEW_MOUNTS | _NEW_UTS | _NEW_IPC | _NEW_PIDS | _NEW_NET
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = (
    *(1, 2, 4, 8, 32, 4096),
    *(16384, 1 << 18),
)
_MS_NOATIME, _MS_NODIRATIME, _MS_RELATIME, _ST_RELATIME = 1024, 2048, 1 << 21, 4096
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE = 442, -100, 0x8000
_ATTR_RDONLY_NOSUID_NODEV = 1 | 2 | 4
_KEYCTL = {"x86_64": 250, "aarch64": 219}
_JOIN_NEW_SESSION_KEYRING = 1
_CAPABILITY_VERSION = 0x20080522
_NOBODY = 65534
_TMP_BYTES = 16 * 2**20
_ROOTS = ("/mnt", "/media", "/srv", "/sys", "/proc")

_libc = ctypes.CDLL(None, use_errno=True)


def enter() -> bool:
    """Move this process into new namespaces; its next child is process 1 of the new process namespace.

    Returns:
        Whether the program can become ``nobody`` in them.

    Raises:
        OSError: this machine or container does not allow it.
    """
    uid, gid = os.geteuid(), os.getegid()
    is_admin = uid == 0 and _libc.unshare(_ALL) == 0
    if not is_admin:
        _call("unshare", _libc.unshare, _ALL | _NEW_USER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    return is_admin and _has_nobody()


def _has_nobody() -> bool:
    """Whether this user namespace has a second user: the machine's own has, and most of containers have."""
    users = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    is_mapped = any(int(first) <= _NOBODY < int(first) + int(count) for first, _, count in users)
    return is_mapped and Path("/proc/self/setgroups").read_text().strip() == "allow"


def enclose() -> None:
    """Make a file system with Python's own files the root of this process, and close all other files.

    Raises:
        OSError: a mount was refused.
    """
    sources = _sources()
    places = [Path(root) for root in _ROOTS if Path(root).is_dir() and not any(_is_in(s, root) for s in sources)]
    if not places:
        raise FileNotFoundError(f"none of {', '.join(_ROOTS)} can be covered by a mount")
    place = places[0]
    devices = [Path("/dev", name) for name in ("null", "zero", "random", "urandom")]
    _mount("tmpfs", str(place), "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    for source in sources:
        _bind(source, place, read_only=True)
    for device in devices:
        if device.exists():
            _bind(device, place, read_only=False)
    (place / "tmp").mkdir()
    options = f"size={_TMP_BYTES},nr_inodes=1000,mode=1777"
    _mount("tmpfs", str(place / "tmp"), "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, options)
    _mount("none", str(place), "", _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
    # No chroot and no user namespace can be made inside a chroot, so the program can't leave it.
    os.chroot(place)
    os.chdir("/tmp")
    _libc.sethostname(b"localhost", 9)


def drop_rights(become_nobody: bool) -> None:
    """Give up every right over the namespaces, for good.

    Args:
        become_nobody: what :func:`enter` returned.

    Raises:
        OSError: a right was not given up.
    """
    number = _KEYCTL.get(platform.machine())
    if number is not None:
        _libc.syscall(number, _JOIN_NEW_SESSION_KEYRING, 0)  # not the keys of the trainer's session
    if become_nobody:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
    _call("capset", _libc.capset, header, bytes(24))


def _sources() -> list[Path]:
    """Folders and files that the interpreter needs to run and to import the standard library."""
    named = [Path(entry) for entry in (*sys.path, *os.environ.get("LD_LIBRARY_PATH", "").split(":")) if entry]
    named += [Path(sys.base_prefix, "lib"), Path(sys.base_exec_prefix, "lib"), Path(sysconfig.get_path("stdlib"))]
    named += map(Path, ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo"))
    named += map(Path, ("/etc/ld.so.cache", "/etc/localtime", "/gnu/store", "/nix/store"))
    every = {path for name in named for path in (name.absolute(), name.resolve()) if path.exists()}
    every = {path for path in every if path != Path("/")}
    return sorted(path for path in every if not any(_is_in(path, other) for other in every if other != path))


def _is_in(path: Path, folder: Path | str) -> bool:
    return path.is_relative_to(folder)


def _bind(source: Path, place: Path, *, read_only: bool) -> None:
    target = place / source.relative_to("/")
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    _mount(str(source), str(target), "", _MS_BIND | _MS_REC)
    if read_only:
        _make_read_only(str(target))


def _make_read_only(target: str) -> None:
    """Make a mount and those below it read-only; before Linux 5.12 only the mount itself."""
    attributes = struct.pack("=QQQQ", _ATTR_RDONLY_NOSUID_NODEV, 0, 0, 0)
    size = len(attributes)
    if _libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, target.encode(), _AT_RECURSIVE, attributes, size) == 0:
        return
    if ctypes.get_errno() != errno.ENOSYS:
        raise OSError(ctypes.get_errno(), f"mount_setattr {target}: {os.strerror(ctypes.get_errno())}")
    present = os.statvfs(target).f_flag  # flags of the machine's own mount must stay; all but one have the same number
    kept = present & (_MS_NOEXEC | _MS_NOATIME | _MS_NODIRATIME) | (_MS_RELATIME if present & _ST_RELATIME else 0)
    _mount("none", target, "", _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV | kept)


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    words = (source.encode(), target.encode(), kind.encode() or None, ctypes.c_ulong(flags), options.encode() or None)
    _call(f"mount {target}", _libc.mount, *words)


def _call(what: str, function: Callable[..., int], *arguments: object) -> None:
    if function(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
