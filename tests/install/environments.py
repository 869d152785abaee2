"""Makes what a new user would have: the wheel, and virtual environments into which pip has resolved it by itself."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TORCH_PINS = ROOT / "torchrl_sglang" / "server" / "cpu_requirements.txt"
# Never resolved here: SGLang's requirements are several gigabytes of CUDA.
NOT_INSTALLED = ("sglang", "dev")


def call(command: Sequence[str | Path], *, cwd: Path | None = None, **options: object) -> str:
    """Run a command and return its output; on failure the output is shown, and this program ends."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=cwd, check=False, **options)  # type: ignore[call-overload]
    if done.returncode != 0:
        raise SystemExit(
            f"{' '.join(map(str, command))}\nended with exit code {done.returncode}\n{done.stdout}{done.stderr}"
        )
    return str(done.stdout)


def pip(python: Path, *words: str | Path) -> str:
    return call([python, "-m", "pip", "--disable-pip-version-check", "--no-input", *words])


def build_wheel(folder: Path) -> Path:
    """The wheel, built from a copy of what git tracks, so that no file that only lies in the checkout gets in."""
    source = folder / "source"
    tracked = call(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT).split("\0")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    pip(Path(sys.executable), "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source)
    (wheel,) = folder.glob("torchrl_sglang-*.whl")
    return wheel


def check_wheel(wheel: Path) -> None:
    """The wheel has the files that code reads from beside itself, and nothing that only the repository needs."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    for needed in ("py.typed", "server/cpu_requirements.txt", "server/cpu_stand_ins/triton/__init__.py"):
        assert f"torchrl_sglang/{needed}" in names, f"{needed} is missing in {wheel.name}"
    outside = {name.split("/")[0] for name in names if not name.startswith(("torchrl_sglang/", "torchrl_sglang-"))}
    assert not outside, f"{wheel.name} installs {outside} beside the package"


def requirements(wheel: Path) -> dict[str, list[str]]:
    """What each extra requires, as written; the key ``""`` has what is always required."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
        metadata = email.message_from_string(archive.read(name).decode())
    found: dict[str, list[str]] = {"": [], **{extra: [] for extra in metadata.get_all("Provides-Extra", [])}}
    for line in metadata.get_all("Requires-Dist", []):
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra == ['\"](.*?)['\"]", marker)
        found[extra[1] if extra else ""].append(requirement.strip())
    return found


def lowest_versions(wheel: Path, extras: Sequence[str]) -> Iterator[str]:
    """A constraint per requirement of these extras: the lowest version that the wheel allows. torch has none."""
    lowest: dict[str, tuple[int, ...]] = {}
    required = requirements(wheel)
    pending, seen = ["", *extras], set()
    while pending:
        extra = pending.pop()
        if extra in seen:
            continue
        seen.add(extra)
        for line in required[extra]:
            own = re.match(r"torchrl-sglang\[([\w,-]+)\]", line)
            if own:
                pending += own[1].split(",")
                continue
            bound = re.match(r"([\w.-]+?)\s*(?:[<!][^,]*,)?>=([\d.]+)", line)
            assert bound, f"{line!r} has no lowest version"
            version = tuple(map(int, bound[2].split(".")))
            lowest[bound[1]] = max(version, lowest.get(bound[1], ()))
    for name, version in sorted(lowest.items()):
        if name != "torch":  # older builds without CUDA are not on a package index
            yield f"{name}=={'.'.join(map(str, version))}"


class Environments:
    """Virtual environments that share one torch, whose build without CUDA takes up 1 GB; all else is their own."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.folder = folder
        self.wheel = wheel
        self._torch = self._make("torch")
        pip(self._torch, "install", "--quiet", "--constraint", TORCH_PINS, "torch")

    def install(self, name: str, extras: Sequence[str], *, lowest: bool = False) -> Path:
        """Let pip resolve the wheel with these extras; returns the environment's Python."""
        python = self._make(name)
        shared = next(self._torch.parent.parent.glob("lib/python3*/site-packages"))
        next(python.parent.parent.glob("lib/python3*/site-packages")).joinpath("torch.pth").write_text(f"{shared}\n")
        words: list[str | Path] = ["install", "--quiet"]
        if lowest:
            constraints = self.folder / f"{name}.txt"
            constraints.write_text("\n".join(lowest_versions(self.wheel, extras)) + "\n")
            words += ["--constraint", constraints]
        listed = f"[{','.join(extras)}]" if extras else ""
        pip(python, *words, f"torchrl-sglang{listed} @ {self.wheel.as_uri()}")
        pip(python, "check")
        return python

    def _make(self, name: str) -> Path:
        call([sys.executable, "-m", "venv", self.folder / name])
        return self.folder / name / "bin" / "python"


def user_environment(home: Path) -> dict[str, str]:
    """The variables of a new user's shell: an empty home directory, no GPU, nothing of a development environment."""
    dropped = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME", "COVERAGE_PROCESS_START")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "HOME": str(home), "CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "PASSIVE"}
