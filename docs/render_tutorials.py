"""Runs the tutorials and writes their pages: prose, code, and the output and figures of a real run.

    make tutorials                                   # run all of them, about ten minutes on 2 cores
    python docs/render_tutorials.py run rollouts     # run one
    python docs/render_tutorials.py prose            # only the prose has changed: keep the last output

A tutorial is a script in sphinx-gallery's format: a docstring, then blocks that begin with ``# %%`` and comment lines
(reStructuredText), followed by code. For ``tutorials/NAME.py`` three things are written to ``docs/tutorials/``:
``NAME.json`` (the record of the run), ``NAME_1.png``... (its figures) and ``NAME.rst`` (the page). `make docs` reads
them and runs no tutorial.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import itertools
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "tutorials"
PAGES = ROOT / "docs" / "tutorials"
ORDER = ("rollouts", "weight_sync", "grpo_from_scratch")
PACKAGES = ("torch", "torchrl", "tensordict", "transformers", "sglang")


class TutorialError(Exception):
    """A tutorial can't be rendered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Prose and the code that follows it; one of the two may be empty.

    Attributes:
        prose: reStructuredText.
        code: Python, without leading or trailing blank lines.
        line: number of the script's line on which the code begins, counted from 1.
    """

    prose: str
    code: str
    line: int


def read_blocks(source: str) -> list[Block]:
    """Split a script in sphinx-gallery's format into its blocks; the prose of the first is the docstring."""
    docstring = ast.parse(source).body[0]
    if not (isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant) and docstring.end_lineno):
        raise TutorialError("a tutorial has to begin with a docstring")
    lines = source.splitlines()
    starts = [docstring.end_lineno, *(i for i, line in enumerate(lines) if line.startswith("# %%")), len(lines)]
    blocks = []
    for start, end in itertools.pairwise(starts):
        if start == docstring.end_lineno:
            prose, first = str(docstring.value.value).strip(), start
        else:
            first = start + 1
            while first < end and lines[first].startswith("#"):
                first += 1
            prose = "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[start + 1 : first])
        while first < end and not lines[first].strip():
            first += 1
        blocks.append(Block(prose=prose, code="\n".join(lines[first:end]).rstrip(), line=first + 1))
    return blocks


def run(name: str) -> dict[str, Any]:
    """Run a tutorial block by block, in one namespace, and write its figures.

    Returns:
        The record: the code, output and figures of each block, and the environment of the run.

    Raises:
        TutorialError: the output contains a path of this machine.
    """
    import matplotlib

    matplotlib.use("agg")
    script = SCRIPTS / f"{name}.py"
    namespace: dict[str, Any] = {"__name__": "__main__", "__file__": str(script)}
    for old in PAGES.glob(f"{name}_*.png"):
        old.unlink()
    started, blocks, num_figures = time.monotonic(), [], 0
    for block in read_blocks(script.read_text()):
        printed = io.StringIO()
        with contextlib.redirect_stdout(_Tee(printed, sys.stderr)):
            exec(compile("\n" * (block.line - 1) + block.code, str(script), "exec"), namespace)
        figures = _save_figures(name, num_figures)
        num_figures += len(figures)
        blocks.append({"code": block.code, "printed": printed.getvalue().rstrip().splitlines(), "figures": figures})
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in PACKAGES)
    seconds = time.monotonic() - started
    ran_on = f"{os.cpu_count()} CPU cores, without a GPU, in {seconds:.0f} s, with {versions}"
    record = {"ran_on": ran_on, "blocks": blocks}
    _refuse_paths(json.dumps(record))
    (PAGES / f"{name}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return record


def _save_figures(name: str, num_before: int) -> list[dict[str, str]]:
    """Save and close the figures of a block; the alternative text of a figure consists of its titles."""
    import matplotlib.pyplot as plt

    figures = []
    for number in plt.get_fignums():
        figure = plt.figure(number)
        file = f"{name}_{num_before + len(figures) + 1}.png"
        titles = [axes.get_title(location) for axes in figure.axes for location in ("left", "center")]
        figure.savefig(PAGES / file, dpi=110)
        figures.append({"file": file, "alt": "; ".join(filter(None, titles))})
        plt.close(figure)
    return figures


def _refuse_paths(text: str) -> None:
    for path in {str(ROOT), str(Path.home()), sys.prefix, tempfile.gettempdir()}:
        if path in text:
            raise TutorialError(f"the tutorial's output contains a path of this machine: {path}")


class _Tee(io.TextIOBase):
    """Writes to several files, so that the output of a run is also shown as progress."""

    def __init__(self, *files: TextIO) -> None:
        self._files = files

    def write(self, text: str) -> int:
        for file in self._files:
            file.write(text)
            file.flush()
        return len(text)


def page(name: str, blocks: list[Block], record: dict[str, Any]) -> str:
    """Make the page of a tutorial from its script and the record of a run.

    Raises:
        TutorialError: the code has changed since the run.
    """
    if [block.code for block in blocks] != [ran["code"] for ran in record["blocks"]]:
        raise TutorialError(
            f"the code of tutorials/{name}.py has changed since the recorded run: "
            f"python docs/render_tutorials.py run {name} runs it again"
        )
    parts = [f".. Made from tutorials/{name}.py by docs/render_tutorials.py: edit the script, not this page."]
    for block, ran in zip(blocks, record["blocks"], strict=True):
        parts.append(block.prose)
        if block.code:
            parts.append(_literal("python", block.code.splitlines()))
        if ran["printed"]:
            parts.append(_literal("text", ran["printed"], ":class: output"))
        for figure in ran["figures"]:
            parts.append(f".. image:: {figure['file']}\n   :alt: {figure['alt']}")
        if block is blocks[0]:
            note = f"Boxes with a blue edge hold the output of a real run on {record['ran_on']}."
            download = f"This page as a script: :download:`{name}.py <../../tutorials/{name}.py>`."
            parts.insert(2, f".. note::\n\n   {note} {download}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _literal(language: str, lines: list[str], *options: str) -> str:
    body = [f"   {line}".rstrip() for line in lines]
    return "\n".join([f".. code-block:: {language}", *(f"   {option}" for option in options), "", *body])


def stored_page(name: str) -> str:
    """Make the page from the current script and the recorded run."""
    record = json.loads((PAGES / f"{name}.json").read_text())
    return page(name, read_blocks((SCRIPTS / f"{name}.py").read_text()), record)


def main() -> None:
    """Run tutorials, or update only the prose of their pages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("what", choices=["run", "prose"])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {' '.join(ORDER)}")
    args = parser.parse_args()
    for name in args.names or ORDER:
        if args.what == "run":
            sys.stderr.write(f"\n===== {name}\n")
            run(name)
        (PAGES / f"{name}.rst").write_text(stored_page(name))


if __name__ == "__main__":
    main()
