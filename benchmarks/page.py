"""Makes the page docs/benchmarks.md and its picture from docs/benchmarks.json, which `make bench` writes.

python benchmarks/page.py         # writes both again; a test says when they are not those of the JSON
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["digest", "draw", "page", "tables", "targets", "write_page"]

Results = Mapping[str, Any]
"""Per section what ``bench.py`` writes: its command, machine and rows."""

INTRO = """\
# Benchmarks

<!-- Made by benchmarks/page.py from docs/benchmarks.json, which `make bench ARGS=--publish` writes. -->

Every figure is a ratio of two things that one program measured in turn: the median of the rounds, with its spread.
Seconds depend on the machine, ratios depend on it less. The machines had no GPU; nobody has run these scripts on GPUs
yet. To repeat them on an idle machine: `make bench` (about 25 minutes on 2 cores). `make bench ARGS=--quick` shows
whether they run.

![ratios with their spread](benchmarks.png)
"""

TITLES = {
    "sync": "Weight sync compared with a bare broadcast",
    "policy": "The policy compared with bare requests",
    "engine": "The engine compared with bare requests",
    "launch": "Launching compared with SGLang's own command",
    "import": "Importing compared with the libraries alone",
}
TEXTS = {
    "sync": """\
Unit: one bare gloo broadcast of the same bytes, already in one tensor, to an otherwise idle process. A whole sync also
checks all values, pauses and continues the servers, and verifies what they hold; settings are the defaults where the
row says nothing else. Phases are in the same unit; verification runs after generation continues.

Where the time of `ipc` goes, measured step by step on 2 cores in the same unit: the trainer copies all weights (0.4)
and checks them on the way (0.1); the server copies them into its parameters (0.7 in one request, 0.06 more for each
further one), while the trainer's model computes the log-probs of the four tokens that verification compares; the server
scores them (0.6 to 0.8: it reads all weights once) and hashes a sixteenth of the bytes (0.25). To pause, begin and end
takes 0.14. The server does all of its part in one thread, which bounds the sum.

What was tried and left out: fewer tokens (a model of this kind takes longer for two or three than for four, and one
token would leave attention untested); scoring on the trainer while it packs (packing took longer by as much); packing
with two threads (0.1); huge pages for the server's memory (nothing). With `broadcast` sender and receiver keep both
cores busy, so the trainer's model computes afterwards.

With `blocking=False` a push returns at once. Beside it a rollout of 16 short prompts ended sooner than alone, probably
because the pause lets its requests start together; this was not examined.

`http` waits for SGLang, which reads the JSON and decodes its base64 in one thread of Python's standard library: that is
more than half of the time. The trainer's part (base64, one copy) and the load of the bucket before run beside it.""",
    "policy": """\
One call of `SGLangWrapper` beside one `requests.post` of the same ids and settings. CPU time is the wrapper's own
beyond the bare client's, as a share of the time of a call: it varies less than the ratio.""",
    "engine": """\
`engine.generate` beside bare requests, with a tiny model: the server's share of the time is as small as possible, so
the client's overhead shows most.""",
    "launch": """\
From the call to the first server that is ready, with the same flags and environment.""",
    "import": """\
In a fresh interpreter. A script that trains imports these libraries anyway.""",
}
EXTRA: dict[str, tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...]] = {
    "sync": (
        ("generation paused", lambda row: f"{row['paused']:.2f}" if "paused" in row else ""),
        ("phases", lambda row: ", ".join(f"{name} {share:.2f}" for name, share in row.get("phases", {}).items())),
    ),
    "policy": (("CPU time", lambda row: f"{row['cpu_percent']:.1f} %" if "cpu_percent" in row else ""),),
    "engine": (("CPU time", lambda row: f"{row['cpu_percent']:.1f} %" if "cpu_percent" in row else ""),),
}


# -------------------------------------------------------------------------------------------------------------- tables


def tables(results: Results) -> str:
    """All sections as Markdown, the targets first."""
    blocks = [_target_table(results)] if any(targets(results)) else []
    blocks += [_section(name, results[name]) for name in TITLES if name in results]
    missing = [name for name in TITLES if name not in results]
    if missing:
        blocks.append(f"Not measured yet: {', '.join(missing)}.\n")
    return "\n".join(blocks)


def _section(name: str, section: Mapping[str, Any]) -> str:
    machine = section["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in machine.get("versions", {}).items())
    pairs = {len(row["ratios"]) for row in section["rows"] if row.get("ratios")}
    rounds = f"; rounds: {' to '.join(map(str, sorted({min(pairs), max(pairs)})))}" if pairs else ""
    extra = EXTRA.get(name, ())
    columns = ["", "ratio", section["spread"], *(title for title, _ in extra)]
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for row in section["rows"]:
        if "ratio" in row:
            cells = [row["name"], f"{row['ratio']:.2f}", f"{row['low']:.2f} to {row['high']:.2f}"]
            lines.append(f"| {' | '.join([*cells, *(cell(row) for _, cell in extra)])} |")
        elif "error" in row:
            lines.append(f"| {row['name']} | not measured: {row['error']} |{' |' * (len(columns) - 2)}")
    facts = [f"* {row['name']}: {row['value']}" for row in section["rows"] if "value" in row]
    note = [section["note"], ""] if section.get("note") else []
    failed = [f"This section is not complete: {section['reason']}.", ""] if section["status"] != "complete" else []
    where = f"{machine['date']}, {machine['cores']} cores; {versions}{rounds}."
    body = [f"    {section['command']}", "", TEXTS[name], "", *note, *failed, *lines, "", *facts]
    return "\n".join([f"## {TITLES[name]}", "", *body, *([""] if facts else []), where, ""])


def targets(results: Results) -> Iterator[tuple[str, float, float]]:
    """What is aimed at: a description, the most that is allowed, and what was measured, where it was."""
    full = [section for section in results.values() if not section["quick"]]  # the ratios of a quick run say nothing
    rows = {row["name"]: row for section in full for row in section["rows"] if "ratio" in row}

    def found(name: str, key: str = "ratio") -> list[float]:
        return [rows[name][key]] if key in rows.get(name, {}) else []

    for transport, whole, paused, bare in (("ipc", 1.8, 1.0, 1.3), ("broadcast", 2.3, 1.8, None)):
        for value in found(f"{transport}, 1 server"):
            yield f"`{transport}`, one server: whole sync", whole, value
        for value in found(f"{transport}, 1 server", "paused"):
            yield f"`{transport}`, one server: generation paused", paused, value
        for value in found(f"{transport}, 1 server, not verified or checked") if bare is not None else []:
            yield f"`{transport}`, one server, without checks: whole sync", bare, value
    for one, three in zip(found("ipc, 1 server", "seconds"), found("ipc, 3 servers", "seconds"), strict=False):
        yield "`ipc`: three servers beside one", 1.8, three / one
    for batch in (1, 16, 64, 256):
        for kind in ("tokens", "chats"):
            for value in found(f"batch of {batch}, {kind}"):
                yield f"policy, {batch} sequences, {kind}", 1.03, value


def _target_table(results: Results) -> str:
    lines = ["| | at most | measured | met |", "| --- | --- | --- | --- |"]
    for what, limit, value in targets(results):
        lines.append(f"| {what} | {limit:.2f} | {value:.2f} | {'yes' if round(value, 2) <= limit else 'no'} |")
    return "\n".join(["## Targets", "", *lines, ""])


# ------------------------------------------------------------------------------------------------------------- picture


def draw(results: Results, path: Path) -> None:
    """Draw every ratio with its spread; the file holds the digest of what was drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = {name: [row for row in results[name]["rows"] if "ratio" in row] for name in TITLES if name in results}
    parts = {name: rows for name, rows in parts.items() if rows}
    heights = [0.8 + 0.25 * len(rows) for rows in parts.values()] or [1.0]
    figure, axes = pyplot.subplots(
        max(1, len(parts)), 1, figsize=(9, sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for axis, (name, rows) in zip(axes[:, 0], parts.items(), strict=False):
        values = [row["ratio"] for row in rows]
        spread = [
            [max(0.0, row["ratio"] - row["low"]) for row in rows],
            [max(0.0, row["high"] - row["ratio"]) for row in rows],
        ]
        axis.barh(range(len(rows)), values, xerr=spread, color="#4477aa", ecolor="#222222", height=0.7)
        axis.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=7)
        axis.invert_yaxis()
        axis.axvline(1.0, color="#cc3311", linewidth=1)
        is_wide = max(values) > 5 * statistics.median(values)  # one slow row would leave nothing of the others
        if is_wide:
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter("{x:g}")
        axis.set_title(TITLES[name] + " (logarithmic)" * is_wide, fontsize=9, loc="left")
        axis.tick_params(axis="x", labelsize=7)
    figure.savefig(path, dpi=110, metadata={"Description": digest(results)})
    pyplot.close(figure)


def digest(results: Results) -> str:
    """A short name of these results, which the picture carries."""
    return hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------- page


def page(results: Results) -> str:
    """The whole page."""
    return f"{INTRO}\n{tables(results)}"


def write_page(docs: Path) -> None:
    """Write ``benchmarks.md`` and ``benchmarks.png`` from ``benchmarks.json`` in this folder."""
    results = json.loads((docs / "benchmarks.json").read_text())
    (docs / "benchmarks.md").write_text(page(results))
    draw(results, docs / "benchmarks.png")


if __name__ == "__main__":
    write_page(Path(__file__).resolve().parent.parent / "docs")
