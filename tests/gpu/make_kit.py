"""Writes gpu-kit.tar.gz: what tests/gpu/kit.py needs on a machine with torch and no package index (about 1 MB).

    python tests/gpu/make_kit.py                    # into outputs/
    python tests/gpu/make_kit.py --out FOLDER --part-mb 55
    python tests/gpu/make_kit.py --with sglang      # adds packages of this environment; several files, if it is large

On the other machine: `cat gpu-kit.tar.gz* | tar xz`, then `python3 gpu-kit/tests/gpu/kit.py`. Packages are added as
they are installed here, those in pure Python only: a machine with another Python can use them.
"""

from __future__ import annotations

import argparse
import io
import sys
import tarfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAME = "gpu-kit"
# The HTTP client that the package uses, with what it needs.
PACKAGES = ("requests", "urllib3", "idna", "certifi")
FOLDERS = ("torchrl_sglang", "tests/gpu")


def files_of(package: str) -> dict[str, Path]:
    """Path below ``kit_packages/`` to file, for an installed package; its compiled modules are left out."""
    distribution = metadata.distribution(package)
    found = {}
    for path in distribution.files or ():
        is_plain = ".." not in path.parts and "__pycache__" not in path.parts and path.suffix not in (".so", ".pyc")
        if is_plain and Path(str(distribution.locate_file(path))).is_file():
            found[str(path)] = Path(str(distribution.locate_file(path)))
    if not found:
        raise SystemExit(f"{package} is not installed here as files")
    return found


def contents(packages: list[str]) -> dict[str, Path]:
    """Name in the archive to file."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                found[path.relative_to(ROOT).as_posix()] = path
    for package in packages:
        found |= {f"kit_packages/{name}": path for name, path in files_of(package).items()}
    return found


def write_parts(content: bytes, out: Path, part_bytes: int) -> list[Path]:
    """Write the archive as one file, or as numbered parts that `cat` puts together."""
    for old in out.glob(f"{NAME}.tar.gz*"):
        old.unlink()
    pieces = [content[start : start + part_bytes] for start in range(0, len(content), part_bytes)]
    paths = [out / (f"{NAME}.tar.gz" if len(pieces) == 1 else f"{NAME}.tar.gz.{i:02}") for i in range(len(pieces))]
    for path, piece in zip(paths, pieces, strict=True):
        path.write_bytes(piece)
    return paths


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=Path("outputs"))
    parser.add_argument("--part-mb", type=float, default=55, help="largest file, in units of 10^6 bytes")
    parser.add_argument("--with", nargs="+", default=[], dest="more", metavar="PACKAGE", help="further packages")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, path in contents([*PACKAGES, *args.more]).items():
            archive.add(path, f"{NAME}/{name}", recursive=False)
    for path in write_parts(buffer.getvalue(), args.out, int(args.part_mb * 1e6)):
        print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
