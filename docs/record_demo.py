"""Record the quick start and draw it as docs/demo.svg, an animation of 20 seconds.

    python docs/record_demo.py run         # runs examples/grpo.py (about 5 minutes), writes docs/demo.json, draws;
                                           # docs/quickstart.png is the run's report.png
    python docs/record_demo.py draw        # draws docs/demo.svg from docs/demo.json

The file is an SVG with CSS alone, so it moves in a README and on the site. Where animations are switched off it shows
the last frame. The recording is cut: all 16 steps are shown, each for the same time, with the run's clock.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from html import escape
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
RECIPE = DOCS.parent / "examples" / "grpo.py"
RECORD, PICTURE, REPORT = DOCS / "demo.json", DOCS / "demo.svg", DOCS / "quickstart.png"
PACKAGES = ("torch", "torchrl", "sglang")

SECONDS, HOLD_S = 20.0, 4.5  # of the animation, and of its last frame
FIRST_S = 2.0  # how long the last frame is shown before the first round: a page should not open with an empty terminal
COLUMNS, LINES = 112, 9  # of the upper pane
CHAR, LINE = 8.0, 21.0  # width of a character and height of a line, in pixels
WIDTH = 20 + int(COLUMNS * CHAR) + 20
TOP, PANE = 74, 318  # first baseline of each pane
HEIGHT = int(PANE + 8.2 * LINE)
MAX_ANSWERS = 8


def record() -> dict[str, Any]:
    """Run the recipe and return what it printed, with times, and a typical answer of each step."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-u", str(RECIPE)]
        started, printed = time.monotonic(), []
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            printed.append({"at_s": round(time.monotonic() - started), "text": line.rstrip()})
        if process.wait() != 0:
            raise SystemExit("the run failed")
        results = Path(folder, "outputs/quickstart")
        shutil.copy(results / "report.png", REPORT)
        lines = (results / "samples.jsonl").read_text().splitlines()
        samples = [json.loads(line) for line in lines]
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in PACKAGES)
    ran_on = f"{os.cpu_count()} CPU cores, no GPU; {versions}"
    return {"ran_on": ran_on, "printed": printed, "answers": [typical(step) for step in by_step(samples)]}


def by_step(samples: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The samples of each step."""
    return [list(step) for _, step in groupby(samples, key=lambda sample: sample["step"])]


def typical(step: list[dict[str, Any]]) -> dict[str, Any]:
    """The most frequent answer to the step's first question; among equally frequent ones, the first."""
    asked = [sample for sample in step if sample["position"] == step[0]["position"]]
    response = Counter(sample["response"] for sample in asked).most_common(1)[0][0]
    found = next(sample for sample in asked if sample["response"] == response)
    question = found["prompt"].partition("user\n")[2].partition(" Answer")[0]
    answer = {"question": question, "response": response.partition("<|")[0]}
    return {**answer, **{name: found[name] for name in ("step", "weight_version", "reward", "right")}}


def draw(run: dict[str, Any], *, paused_at_s: float | None = None) -> str:
    """The animation as the text of an SVG file.

    Args:
        run: from :func:`record`.
        paused_at_s: draw the frame of this second, which does not move; for looking at it.
    """
    steps = [line for line in run["printed"] if line["text"].startswith("step ")]
    last = [line for line in run["printed"] if line["text"].startswith("mean reward")]
    shown, answers = [*steps, *last], run["answers"][: len(steps)]
    tick = (SECONDS - HOLD_S) / (len(shown) + 1)
    log = [(0.0, text(0, 0, "$ python examples/grpo.py", "prompt", top=TOP))]
    log += [
        (row * tick, text(0, row, shorten(entry["text"]), "log" if entry in steps else "done", top=TOP))
        for row, entry in enumerate(shown, start=1)
    ]
    replies = [((row + 1.4) * tick, answer_line(row, answer)) for row, answer in enumerate(answers)]
    clocks = [(row * tick, clock(entry["at_s"])) for row, entry in enumerate(shown, start=1)]
    begins_s = SECONDS - FIRST_S if paused_at_s is None else paused_at_s
    state = f"animation-delay: {-begins_s:g}s" + ("" if paused_at_s is None else "; animation-play-state: paused")
    timing = f"animation-duration: {SECONDS:g}s; animation-timing-function: step-end; {state}"
    styles = [
        *STYLES,
        f"g {{ {timing}; animation-iteration-count: infinite }}",
        scroll("log-pane", [at_s for at_s, _ in log], LINES),
        scroll("answer-pane", [at_s for at_s, _ in replies], MAX_ANSWERS),
    ]
    return SVG.format(
        width=WIDTH,
        height=HEIGHT,
        styles="\n".join(styles),
        title=escape(run["ran_on"]),
        clocks="\n".join(
            visible(content, at_s, None if number == len(clocks) else clocks[number][0])
            for number, (at_s, content) in enumerate(clocks, start=1)
        ),
        right=WIDTH - 20,
        log_y=TOP - 15,
        log_height=LINES * LINE + 8,
        answers_y=PANE - 15,
        answers_height=MAX_ANSWERS * LINE + 8,
        divider=PANE - 2.3 * LINE,
        heading=PANE - 1.25 * LINE,
        log="\n".join(visible(content, at_s) for at_s, content in log),
        answers="\n".join(visible(content, at_s) for at_s, content in replies),
    )


def shorten(line: str) -> str:
    """A line that fits into the pane; a longer one ends after one of its parts."""
    if len(line) <= COLUMNS:
        return line
    cut = max(line.rfind(mark, 0, COLUMNS - 2) for mark in (" | ", "; ", ". "))
    return f"{line[:cut]}{' |' if line[cut] == ' ' else line[cut]} …"


def text(column: int, row: int, content: str, kind: str, *, top: float) -> str:
    """A piece of text in a pane whose first line is at ``top``."""
    return (
        f'<text class="{kind}" x="{20 + column * CHAR:g}" y="{top + row * LINE:g}">'
        f"{escape(content[: COLUMNS - column])}</text>"
    )


def answer_line(row: int, answer: dict[str, Any]) -> str:
    """A line of the lower pane."""
    response = answer["response"].replace("\n", "↵")
    mark = "✓" if answer["right"] else " "
    parts = (
        (0, f"weights v{answer['weight_version']}", "dim"),
        (14, answer["question"], "log"),
        (32, mark, "right"),
        (34, response, "right" if answer["right"] else "wrong"),
        (100, f"reward {answer['reward']:.2f}", "dim"),
    )
    return "".join(text(column, row, content, kind, top=PANE) for column, content, kind in parts)


def clock(at_s: int) -> str:
    """The time since the run began."""
    return f'<text class="dim end" x="{WIDTH - 20}" y="31">{at_s // 60}:{at_s % 60:02d} of the run</text>'


def visible(content: str, begins_s: float, ends_s: float | None = None) -> str:
    """A group that is seen from one second of the animation to another, or to its end."""
    if begins_s == 0 and ends_s is None:
        return content
    name = f"from{begins_s:.2f}{'' if ends_s is None else f'to{ends_s:.2f}'}".replace(".", "_")
    frames = f"0% {{ opacity: 0 }} {percent(begins_s)} {{ opacity: 1 }}"
    if ends_s is not None:
        frames += f" {percent(ends_s)}, 100% {{ opacity: 0 }}"
    hidden = "" if ends_s is None else ' opacity="0"'
    return f'<style>@keyframes {name} {{ {frames} }}</style><g style="animation-name: {name}"{hidden}>{content}</g>'


def scroll(name: str, appear_s: list[float], room: int) -> str:
    """Keyframes that move a pane up by a line with each line that it has no room for."""
    moves = [
        f"{percent(at_s)} {{ transform: translateY({-extra * LINE:g}px) }}"
        for extra, at_s in enumerate(appear_s[room:], start=1)
    ]
    end = f"translateY({-len(moves) * LINE:g}px)"
    return (
        f"@keyframes {name} {{ 0% {{ transform: translateY(0) }} {' '.join(moves)} 100% {{ transform: {end} }} }}\n"
        f"#{name} {{ transform: {end}; animation-name: {name} }}"
    )


def percent(at_s: float) -> str:
    """A second of the animation, as keyframes write it."""
    return f"{100 * at_s / SECONDS:.2f}%"


FONT = "13.3px ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
STYLES = [
    f"text {{ font: {FONT}; white-space: pre }}",
    ".log { fill: #c9d1d9 } .dim { fill: #8b949e } .prompt { fill: #79c0ff } .done { fill: #7ee787 }",
    ".right { fill: #7ee787; font-weight: 600 } .wrong { fill: #ffa657 } .end { text-anchor: end }",
    "@media (prefers-reduced-motion: reduce) { g { animation: none !important } }",
]

SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img"
     aria-label="A terminal: the quick start trains a language model for 16 steps; its answers become right">
<style>
{styles}
</style>
<rect width="{width}" height="{height}" rx="10" fill="#0d1117"/>
<rect width="{width}" height="48" rx="10" fill="#161b22"/>
<circle cx="24" cy="26" r="6" fill="#ff5f56"/><circle cx="44" cy="26" r="6" fill="#ffbd2e"/>
<circle cx="64" cy="26" r="6" fill="#27c93f"/>
<text class="dim" x="92" y="31">{title}</text>
{clocks}
<svg x="0" y="{log_y}" width="{right}" height="{log_height}" viewBox="0 {log_y} {right} {log_height}"><g id="log-pane">
{log}
</g></svg>
<line x1="0" x2="{width}" y1="{divider}" y2="{divider}" stroke="#30363d"/>
<text class="dim" x="20" y="{heading}"
>what the server answers, and the version of the weights that chose its tokens</text>
<svg x="0" y="{answers_y}" width="{right}" height="{answers_height}"
     viewBox="0 {answers_y} {right} {answers_height}"><g id="answer-pane">
{answers}
</g></svg>
</svg>
"""


def main() -> None:
    """Record and draw, or draw only."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "draw"])
    if parser.parse_args().what == "run":
        RECORD.write_text(json.dumps(record(), indent=1, ensure_ascii=False) + "\n")
    PICTURE.write_text(draw(json.loads(RECORD.read_text())))


if __name__ == "__main__":
    main()
