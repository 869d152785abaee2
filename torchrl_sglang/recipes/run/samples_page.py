"""Write ``samples.html``: the answers before and after training, each token coloured by log-prob and weight version."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from torchrl_sglang.disk_space import writing

__all__ = ["write_samples_page"]

Sample = Mapping[str, Any]

_READ_BYTES = 4 * 2**20
_MAX_ANSWERS = 48
_MAX_TOKENS = 600
_HUES = (210, 30, 130, 280, 0, 180, 55, 320)

_STYLE = """
body { font: 15px/1.55 system-ui, sans-serif; margin: 2rem auto; max-width: 1240px; padding: 0 1rem; color: #1b1b1b; }
h1 { font-size: 1.35rem; margin-bottom: .2rem; }
.steps { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 2.2rem; }
h2 { font-size: 1.1rem; border-bottom: 2px solid #2166ac; padding-bottom: .2rem; }
h3 { font: 600 .85rem/1.5 ui-monospace, monospace; margin: 1.3rem 0 .3rem; overflow-wrap: anywhere; color: #222; }
h3 small { font: inherit; font-weight: 400; color: #999; }
.answer { display: grid; grid-template-columns: 4.6rem 1fr; gap: .6rem; margin: .2rem 0; align-items: baseline; }
.reward { color: #555; font-size: .85rem; text-align: right; white-space: nowrap; }
.right .reward { color: #1a7f37; font-weight: 600; }
.text { font: 13.5px/1.75 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.text span { border-bottom: 3px solid; padding: 1px 0; }
.legend { font-size: .85rem; color: #444; margin: .6rem 0 1.2rem; }
.legend span { padding: 1px 6px; margin-right: .5rem; border-bottom: 3px solid transparent; color: #1b1b1b; }
.control { color: #888; }
"""


def write_samples_page(samples: Path, path: Path, *, title: str = "Samples") -> bool:
    """Write one HTML file without links to others: the answers of the first step and of the last one in the file.

    Args:
        samples: ``samples.jsonl`` of a run. Of a file above 8 MB, the first and the last 4 MB are read.
        path: the page; replaced atomically.
        title: heading of the page.

    Returns:
        Whether there were samples to show; without, nothing is written.
    """
    steps = _first_and_last_step(samples)
    if not steps:
        return False
    versions = sorted({version for step in steps for sample in step for version in sample["weight_versions"]})
    columns = "\n".join(_column(step, versions, is_first=step is steps[0]) for step in steps)
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>\n'
        f"<h1>{escape(title)}</h1>\n{_legend(versions)}\n"
        f'<div class="steps">\n{columns}\n</div>\n</body></html>\n'
    )
    unfinished = path.with_name(f".{path.name}")
    with writing(path, "the page of samples", incomplete=unfinished):
        unfinished.write_text(page, encoding="utf-8")
        unfinished.replace(path)
    return True


def _first_and_last_step(samples: Path) -> list[list[Sample]]:
    """The samples of the first step and of the last; one list if they are the same, none without samples."""
    if not samples.is_file():
        return []
    with samples.open("rb") as file:
        head = file.read(_READ_BYTES)
        size = file.seek(0, 2)
        file.seek(max(0, size - _READ_BYTES))
        tail = file.read()
    is_whole = size <= _READ_BYTES
    first, last = list(_parsed(head)), list(_parsed(tail if is_whole else tail.partition(b"\n")[2]))
    if not first or not last:
        return []
    first = [sample for sample in first if sample["step"] == first[0]["step"]]
    last = [sample for sample in last if sample["step"] == last[-1]["step"]]
    steps = [first] if first[0]["step"] == last[0]["step"] else [first, last]
    return [step[:_MAX_ANSWERS] for step in steps]


def _parsed(lines: bytes) -> Iterator[Sample]:
    for line in lines[: lines.rfind(b"\n") + 1].splitlines():  # an incomplete last line is left out
        yield json.loads(line)


def _legend(versions: Sequence[int]) -> str:
    log_probs = "".join(
        f'<span style="background:{_background(value)}">{text}</span>'
        for value, text in ((0.0, "certain"), (-0.7, "1 in 2"), (-2.3, "1 in 10"), (-4.6, "1 in 100"))
    )
    marks = "".join(
        f'<span style="border-bottom-color:{_line(version, versions)}">{_version_name(version)}</span>'
        for version in versions
    )
    return (
        f'<div class="legend">Background: how likely the server was to choose the token. {log_probs}<br>'
        f"Line below: the weight version that chose it. {marks}<br>Hover over a token for its numbers.</div>"
    )


def _column(step: Sequence[Sample], versions: Sequence[int], *, is_first: bool) -> str:
    number = step[0]["step"]
    rewards = [sample["reward"] for sample in step]
    right = sum(bool(sample["right"]) for sample in step)
    groups = [list(group) for _, group in groupby(step, key=lambda sample: (sample["position"], sample["prompt"]))]
    name = "Before training" if is_first and number == 1 else "After training" if not is_first else ""
    heading = f"{name}{': ' if name else ''}step {number}"
    body = "\n".join(
        f"<h3>{_prompt(group[0]['prompt'])}</h3>\n" + "\n".join(_answer(sample, versions) for sample in group)
        for group in groups
    )
    return (
        f"<section><h2>{heading}</h2><p>mean reward {sum(rewards) / len(rewards):.3f}, "
        f"{right} of {len(step)} answers right</p>\n{body}</section>"
    )


def _answer(sample: Sample, versions: Sequence[int]) -> str:
    kind = "answer right" if sample["right"] else "answer"
    texts = sample.get("response_tokens") or [f"[{each}]" for each in sample["response_ids"]]
    tokens = "".join(
        f'<span style="background:{_background(log_prob)};border-bottom-color:{_line(version, versions)}" '
        f'title="{escape(repr(text))}: log-prob {log_prob:.3f}, {_percent(log_prob)}, {_version_name(version)}">'
        f"{_visible(text)}</span>"
        for text, log_prob, version in list(zip(texts, sample["log_probs"], sample["weight_versions"], strict=False))[
            :_MAX_TOKENS
        ]
    )
    cut = ' <span class="control">…</span>' if len(texts) > _MAX_TOKENS else ""
    mark = "✓ " if sample["right"] else ""
    return (
        f'<div class="{kind}"><div class="reward">{mark}{sample["reward"]:.2f}</div>'
        f'<div class="text">{tokens}{cut}</div></div>'
    )


def _prompt(text: str) -> str:
    """A prompt on one line, its special tokens and line breaks in gray."""
    parts = re.split(r"(<\|[^|<>]*\|>|</?[a-z_]+>|\n)", text)
    return "".join(
        f"<small>{'↵' if part == chr(10) else escape(part)}</small>" if index % 2 else escape(part)
        for index, part in enumerate(parts)
    )


def _visible(text: str) -> str:
    """Escaped, with a sign for a line break that would otherwise not be seen."""
    return escape(text).replace("\n", '<i class="control">↵</i>\n')


def _background(log_prob: float) -> str:
    """White for a certain token, orange for one that was chosen with a probability of 1 % or less."""
    unlikely = min(1.0, -log_prob / math.log(100)) if math.isfinite(log_prob) else 1.0
    return f"hsl(30 95% {100 - 38 * max(0.0, unlikely):.0f}%)"


def _line(version: int, versions: Sequence[int]) -> str:
    return f"hsl({_HUES[versions.index(version) % len(_HUES)]} 65% 45%)" if version >= 0 else "#bbb"


def _version_name(version: int) -> str:
    return f"weights v{version}" if version >= 0 else "not sampled"


def _percent(log_prob: float) -> str:
    return f"{math.exp(min(log_prob, 0.0)):.1%}" if math.isfinite(log_prob) else "unknown"
