"""A chaos run: GRPO-like training on fake and real servers while things go wrong, drawn from a seed.

    python -m tests.chaos                      # ten minutes: `make chaos`
    python -m tests.chaos --seconds 30 --seed 7 --report chaos.json

Prints what happened and what was counted, writes both as JSON, and exits with 1 if anything was found. The journals
stay in the report's folder if something was found.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARK = f"TORCHRL_SGLANG_CHAOS={uuid.uuid4().hex}"


def main(words: list[str] | None = None) -> int:
    """Parse the command line, run, print and write the report."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="of disturbances (default: 600)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fake", type=int, default=4, help="fake servers (default: 4; 0 leaves them out)")
    parser.add_argument("--real", type=int, default=2, help="real servers (default: 2; 0 leaves them out)")
    parser.add_argument("--report", type=Path, default=Path("outputs/chaos.json"))
    args = parser.parse_args(words)
    args.report.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir=args.report.parent.resolve()))
    try:
        report = run(args, folder)
    except BaseException:
        print(f"the journals are in {folder}", file=sys.stderr)
        raise
    args.report.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    if report["findings"]:
        print(f"the journals are in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run in ``folder``; the report."""
    temporary = folder / "tmp"
    temporary.mkdir()
    name, value = MARK.split("=")
    os.environ.update({name: value, "TMPDIR": str(temporary), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
    tempfile.tempdir = None

    # Only now: the libraries read the environment.
    from tests.chaos.arena import Arena
    from tests.chaos.leftovers import Leftovers
    from tests.chaos.seats import FakeSeat, RealSeat, Seat
    from tests.chaos.verdict import judge
    from tests.loop.forked_processes import ProcessFactory
    from torchrl_sglang.testing import make_tiny_model

    leftovers = Leftovers(MARK, temporary)
    model = make_tiny_model(folder / "model", arch="llama", seed=0)
    start = time.monotonic()
    arenas: list[tuple[str, Arena]] = []
    (folder / "reports").mkdir()
    with ProcessFactory(folder / "reports") as processes:
        try:
            if args.fake:
                fakes: list[Seat] = [FakeSeat(processes, model, proxied=i == 0) for i in range(args.fake)]
                arenas.append(("fake", _arena(Arena, "fake", fakes, processes, model, folder, args.seed)))
            if args.real:
                reals = _side_by_side(
                    [lambda i=i: RealSeat(model, folder / "logs", proxied=i == 0) for i in range(args.real)]
                )
                arenas.append(("real", _arena(Arena, "real", reals, processes, model, folder, args.seed)))
            print(f"servers ready after {time.monotonic() - start:.0f} s; {args.seconds:g} s begin", flush=True)
            _side_by_side([lambda arena=arena: arena.run(args.seconds) for _, arena in arenas])
        finally:
            for _, arena in arenas:
                arena.close()
    report: dict[str, Any] = {"seed": args.seed, "seconds": args.seconds, "arenas": {}, "findings": []}
    for kind, arena in arenas:
        urls = [seat.url for seat in arena.seats]
        verdict = judge(arena.folder, model, kind=kind, seat_urls=urls)
        report["arenas"][kind] = verdict.to_json() | {
            "servers": len(urls),
            "disturbances": dict(arena.counts.most_common()),
            "events": arena.events,
        }
        report["findings"] += [f"{kind}: {finding}" for finding in verdict.findings]
    urls = [seat.url for _, arena in arenas for seat in arena.seats]
    report["left_behind"] = leftovers.find(urls, [pid for _, arena in arenas for pid in arena.trainer_pids])
    report["findings"] += report["left_behind"]
    report["sockets_left_by_sglang"] = leftovers.num_sockets()
    report["whole_run_s"] = round(time.monotonic() - start, 1)
    return report


def _arena(arena: Any, kind: str, seats: Any, processes: Any, model: Path, folder: Path, seed: int) -> Any:
    pause_s = (0.3, 2.5) if kind == "fake" else (1.5, 5.0)
    return arena(
        kind,
        seats,
        processes,
        model=model,
        folder=folder / kind,
        seed=seed,
        pause_s=pause_s,
        has_faults=kind == "fake",
        restart_every_s=0.0 if kind == "fake" else 120.0,
    )


def _side_by_side(calls: list[Callable[[], Any]]) -> list[Any]:
    results: list[Any] = [None] * len(calls)
    errors: list[BaseException] = []

    def one(index: int) -> None:
        try:
            results[index] = calls[index]()
        except BaseException as error:  # noqa: BLE001  raised below
            traceback.print_exc()
            errors.append(error)

    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


ROWS = {
    "prompts": "prompts",
    "lost": "without an answer",
    "doubled": "with two answers",
    "tokens": "tokens checked",
    "wrong_tokens": "of other weights than their label says",
    "versions": "weight versions among them",
    "waits": "calls (batches, streams, syncs)",
    "overdue": "longer than their limits allow",
    "syncs": "syncs",
    "failed_syncs": "failed syncs",
    "left": "servers taken out of the pool",
    "joined": "servers taken in",
    "lives": "trainers, one after the other",
    "settled_s": "seconds until all serve again at the end",
}


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    kinds = list(report["arenas"])
    lines = [f"{'':44}" + "".join(f"{kind + ' servers':>16}" for kind in kinds)]
    for name, text in {"servers": "servers", **ROWS}.items():
        lines.append(f"{text:44}" + "".join(f"{report['arenas'][kind][name]:>16}" for kind in kinds))
    for what in sorted({what for kind in kinds for what in report["arenas"][kind]["disturbances"]}):
        counts = (report["arenas"][kind]["disturbances"].get(what, 0) for kind in kinds)
        lines.append(f"{what:44}" + "".join(f"{count:>16}" for count in counts))
    lines.append(f"left behind: {len(report['left_behind'])} processes, ports, files and shared-memory segments")
    lines += [f"FOUND {finding}" for finding in report["findings"]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
