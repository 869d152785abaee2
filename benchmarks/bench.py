"""Runs all benchmarks, one section after the other, and writes their figures as JSON, tables and a picture.

    make bench                                   # everything, for an idle machine: about 25 minutes on 2 cores, 8 GB
    make bench ARGS=--quick                      # do all sections run? 2 minutes; its figures say nothing
    make bench ARGS="--only sync --publish"      # one section; then write it into the documentation
    make bench ARGS=--resume                     # go on after an interruption, without the sections that are complete

Results are in outputs/bench/: results.json (written again after each section), tables.md and ratios.png. A section that
fails, or takes too long, is reported with the rows that it got, and the others go on; the exit status is then 1.
`--publish` writes docs/benchmarks.json, .md and .png: only sections of a full run that are complete replace the old.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import page

FOLDER = Path(__file__).resolve().parent
DOCS = FOLDER.parent / "docs"
PACKAGES = ("torch", "torchrl", "tensordict", "transformers", "sglang")
LEAST_PAIRS = 7
INTERRUPTED = "it was interrupted"
END_S = 30  # how long a section that takes too long has to stop its servers


@dataclass(frozen=True, slots=True)
class Section:
    """A script, and its arguments in full and quick form.

    Attributes:
        limit_s: longest time of the full form; on an idle machine it takes less than half.
    """

    script: str
    full: tuple[str, ...]
    quick: tuple[str, ...]
    limit_s: int


_QUICK = ("--pairs", "2", "--max-repeats", "0")
_REPEATS = ("--max-repeats", "40")
SECTIONS = {
    "import": Section("import_time.py", _REPEATS, _QUICK, 600),
    "engine": Section(
        "generate_throughput.py", _REPEATS, (*_QUICK, "--servers", "1", "--batches", "16", "--new-tokens", "8"), 900
    ),
    "sync": Section(
        "weight_sync.py",
        _REPEATS,
        (*_QUICK, "--tiny", "--servers", "1", "--buckets-mb", "--stages", "always", "--no-unchecked"),
        1800,
    ),
    "policy": Section("policy_overhead.py", _REPEATS, (*_QUICK, "--tiny", "--batches", "16:8", "--no-threads"), 1800),
    "launch": Section("launch_time.py", _REPEATS, ("--pairs", "1", "--max-repeats", "0"), 1200),
}


def run_section(name: str, section: Section, out: Path, *, quick: bool, limit_s: float) -> dict[str, Any]:
    """Run a section's script; returns its status, its rows and where they were measured. Never raises for a failure."""
    rows_path = out / f"rows-{name}.jsonl"
    rows_path.unlink(missing_ok=True)
    words = [section.script, *(section.quick if quick else section.full)]
    print(f"\n== {name}: python benchmarks/{' '.join(words)}", flush=True)
    command = [sys.executable, str(FOLDER / words[0]), *words[1:], "--rows", str(rows_path)]
    started = time.monotonic()
    process = subprocess.Popen(command)
    reason = ""
    try:
        status = process.wait(limit_s)
        reason = f"its script ended with status {status}" if status else ""
    except subprocess.TimeoutExpired:
        reason = f"it took longer than {limit_s:.0f} s"
    except KeyboardInterrupt:
        reason = INTERRUPTED
    finally:
        _end(process)
    rows = read_rows(rows_path)
    failed = [row["name"] for row in rows if "error" in row]
    if not reason and failed:
        reason = f"{len(failed)} of {len(rows)} rows could not be measured: {', '.join(failed)}"
    if not reason and not rows:
        reason = "its script wrote no rows"
    print(
        f"== {name}: {time.monotonic() - started:.0f} s, {len(rows)} rows" + (f"; FAILED: {reason}" if reason else "")
    )
    return {
        "command": f"python benchmarks/{' '.join(words)}",
        "status": "failed" if reason else "complete",
        "reason": reason,
        "quick": quick,
        "spread": "quartiles",
        "machine": machine(),
        "seconds": round(time.monotonic() - started),
        "rows": rows,
    }


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a script, which stops its servers when it is interrupted; they end with it when it is killed."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows that a script has written; the last line may be cut off where the script was killed."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def machine() -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cores": len(os.sched_getaffinity(0)),
        "python": sys.version.split()[0],
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def load_results(path: Path) -> dict[str, Any]:
    """Results by section; empty if there are none or the file is damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def write_results(results: dict[str, Any], path: Path) -> None:
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    temporary.replace(path)


def publishable(results: dict[str, Any]) -> dict[str, Any]:
    """The sections that may go into the documentation: complete, not quick, each row from enough pairs."""
    return {
        name: section
        for name, section in results.items()
        if section["status"] == "complete"
        and not section["quick"]
        and all(len(row["ratios"]) >= LEAST_PAIRS for row in section["rows"] if "ratio" in row)
    }


def publish(results: dict[str, Any]) -> list[str]:
    """Write the documentation's JSON, page and picture; returns the sections that were replaced."""
    new = publishable(results)
    published = load_results(DOCS / "benchmarks.json") | new
    write_results({name: published[name] for name in SECTIONS if name in published}, DOCS / "benchmarks.json")
    page.write_page(DOCS)
    return list(new)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="two rounds with tiny models: does everything run?")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run")
    parser.add_argument("--resume", action="store_true", help="leave out sections that results.json has complete")
    parser.add_argument("--publish", action="store_true", help="write docs/benchmarks.json, .md and .png afterwards")
    parser.add_argument("--out", type=Path, help="folder of the results (default: outputs/bench, or bench-quick)")
    parser.add_argument("--limit-factor", type=float, default=1.0, help="multiplies the sections' time limits")
    args = parser.parse_args()
    if args.quick and args.publish:
        parser.error("the figures of --quick say nothing: they are not published")
    out: Path = args.out or Path("outputs") / ("bench-quick" if args.quick else "bench")
    out.mkdir(parents=True, exist_ok=True)
    results = load_results(out / "results.json")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what is measured is kept, servers stop
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a script ignore it otherwise
    for name in args.only:
        old = results.get(name, {})
        if args.resume and old.get("status") == "complete" and old.get("quick") == args.quick:
            print(f"== {name}: complete in {out}/results.json, not run again")
            continue
        section = SECTIONS[name]
        limit_s = section.limit_s * args.limit_factor
        results[name] = run_section(name, section, out, quick=args.quick, limit_s=limit_s)
        write_results(results, out / "results.json")
        if results[name]["reason"] == INTERRUPTED:
            print(f"what was measured is in {out}/results.json; --resume goes on", file=sys.stderr)
            return 1
    (out / "tables.md").write_text(page.tables(results))
    page.draw(results, out / "ratios.png")
    print(f"\n{page.tables(results)}\nresults.json, tables.md and ratios.png are in {out}/")
    if args.publish:
        print(f"published: {', '.join(publish(results)) or 'nothing, since no section is complete'}")
    failed = {name: results[name]["reason"] for name in args.only if results[name]["status"] != "complete"}
    for name, reason in failed.items():
        print(f"FAILED {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
