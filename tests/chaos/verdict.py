"""What a chaos run has shown, counted from the journals: answers, tokens, waits."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.chaos.journal import read_journals
from tests.chaos.limits import MAX_GENERATE_S, MAX_PUSH_S
from tests.chaos.trainer import prompt_ids
from tests.fake_sglang.model import logprobs, read_checkpoint, signature
from torchrl_sglang.testing.models import VOCAB_SIZE

__all__ = ["Verdict", "judge"]

Scores = Callable[[str, list[int]], list[float]]
"""``scores(version, ids_T)``: the log-prob of each token of a sequence by the weights of this version, ``[T]``."""

_TOLERANCE = {"fake": 1e-4, "real": 2e-3}


@dataclass(kw_only=True)
class Verdict:
    """The counts. ``findings`` is empty when all is well.

    Attributes:
        prompts: asked.
        lost: without an answer.
        doubled: with more than one.
        tokens: checked against the weights that their label names.
        wrong_tokens: whose log-prob is not that of these weights.
        other_version_gap: smallest largest difference of an answer to the scores of *another* version: how far a wrong
            label would have been off.
        waits: calls that generate, and syncs.
        overdue: those that took longer than their limits allow.
        longest_wait_s: per kind of call.
        errors: how often calls ended with which error.
        syncs: pushes that succeeded, and that failed.
        versions: version labels among the tokens.
        left: servers taken out of the pool.
        joined: servers taken in.
        lives: trainers.
        findings: what is wrong, in words.
    """

    prompts: int = 0
    lost: int = 0
    doubled: int = 0
    tokens: int = 0
    wrong_tokens: int = 0
    other_version_gap: float = math.inf
    waits: int = 0
    overdue: int = 0
    longest_wait_s: dict[str, float] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    syncs: int = 0
    failed_syncs: int = 0
    versions: int = 0
    left: int = 0
    joined: int = 0
    lives: int = 0
    settled_s: float = math.nan
    findings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def judge(folder: Path, model: Path, *, kind: str, seat_urls: Sequence[str]) -> Verdict:
    """Read the journals of an arena and check them.

    Args:
        folder: the arena's.
        model: the servers' checkpoint.
        kind: ``fake`` or ``real``.
        seat_urls: the servers.
    """
    verdict = Verdict()
    records = list(read_journals(folder))
    of = {kind: [each for each in records if each["kind"] == kind] for kind in {each["kind"] for each in records}}
    _count_waits(verdict, of)
    answers = [answer for record in of.get("answers", ()) for answer in record["answers"]]
    asked = {number for record in of.get("asked", ()) for number in record["prompts"]}
    answered = Counter(answer["prompt"] for answer in answers)
    verdict.prompts = len(asked)
    verdict.lost = len(asked - answered.keys())
    verdict.doubled = sum(count > 1 for count in answered.values())
    scores = _fake_scores(of, model) if kind == "fake" else _real_scores(folder, model)
    _check_tokens(verdict, answers, scores, tolerance=_TOLERANCE[kind])
    verdict.findings += [f"crash: {record['traceback']}" for record in of.get("crash", ())]
    for name, number in (("lost", verdict.lost), ("doubled", verdict.doubled), ("wrong tokens", verdict.wrong_tokens)):
        if number:
            verdict.findings.append(f"{number} {name}")
    _check_end(verdict, of, seat_urls)
    return verdict


def _count_waits(verdict: Verdict, of: dict[str, list[dict[str, Any]]]) -> None:
    calls = [*of.get("wait", ()), *(push | {"what": "push"} for push in of.get("push", ()))]
    errors: Counter[str] = Counter()
    for call in calls:
        limit_s = MAX_GENERATE_S if call["what"] == "generate" else MAX_PUSH_S
        longest = verdict.longest_wait_s.get(call["what"], 0.0)
        verdict.longest_wait_s[call["what"]] = round(max(longest, call["seconds"]), 2)
        # A stream has a limit between two events only.
        if call["seconds"] > limit_s and call["what"] != "stream":
            verdict.overdue += 1
            verdict.findings.append(f"{call['life']}: {call['what']} took {call['seconds']:.1f} s: {call['error']}")
        if call["error"]:
            errors[f"{call['what']}: {call['error'].split(':')[0]}"] += 1
    verdict.waits, verdict.errors = len(calls), dict(errors.most_common())
    pushes = of.get("push", [])
    verdict.syncs = sum(push["error"] is None for push in pushes)
    done = Counter(call["what"] for call in calls if call["error"] is None)
    verdict.left, verdict.joined = done["remove"], done["add"]
    verdict.failed_syncs = len(pushes) - verdict.syncs
    verdict.lives = len(of.get("life", ()))
    through = [push["life"] for push in pushes if push["disk_full"] and push["error"] is None]
    verdict.findings += [f"{life}: a push to a full disk succeeded" for life in through]


def _check_tokens(verdict: Verdict, answers: Sequence[dict[str, Any]], scores: Scores, *, tolerance: float) -> None:
    before: dict[str, str] = {}
    labels: list[str] = []
    for answer in answers:
        ids_T = prompt_ids(answer["prompt"]) + answer["ids"]
        first = len(ids_T) - len(answer["ids"])
        covered = [index for _, start, end in answer["spans"] for index in range(start, end)]
        if covered != list(range(len(answer["ids"]))) or len(answer["logprobs"]) != len(answer["ids"]):
            verdict.findings.append(f"prompt {answer['prompt']}: {len(answer['ids'])} tokens in {answer['spans']}")
            continue
        for version, start, end in answer["spans"]:
            if start == end:  # an update has aborted it before its first token, and its mark labels nothing
                continue
            if version not in before:
                before[version] = labels[-1] if labels else ""
                labels.append(version)
            try:
                by_label = scores(version, ids_T)
            except KeyError:
                verdict.wrong_tokens += end - start
                verdict.findings.append(f"{answer['server']} answered as {version!r}, which nobody sent")
                continue
            gaps = [abs(by_label[first + i] - answer["logprobs"][i]) for i in range(start, end)]
            verdict.tokens += len(gaps)
            wrong = sum(not gap <= tolerance for gap in gaps)
            verdict.wrong_tokens += wrong
            if wrong and len(verdict.findings) < 20:
                verdict.findings.append(f"{answer['server']}: {version} is off by {max(gaps):.2g} ({wrong} tokens)")
            if before[version] and end - start >= 8 and not wrong:
                by_other = scores(before[version], ids_T)
                other = max(abs(by_other[first + i] - answer["logprobs"][i]) for i in range(start, end))
                verdict.other_version_gap = min(verdict.other_version_gap, other)
    verdict.versions = len(labels)
    if verdict.other_version_gap < 2 * tolerance:
        verdict.findings.append(f"versions differ by {verdict.other_version_gap:.2g} only: a wrong one may pass")


def _check_end(verdict: Verdict, of: dict[str, list[dict[str, Any]]], seat_urls: Sequence[str]) -> None:
    if not of.get("end"):
        verdict.findings.append("the last trainer did not finish")
        return
    end = of["end"][-1]
    verdict.settled_s = round(end["settled_s"], 2)
    last = next((push["version"] for push in reversed(of["push"]) if push["error"] is None), None)
    if end["serving"] != [last] * len(seat_urls):
        verdict.findings.append(f"at the end servers answer as {end['serving']}, not as {last}")
    if end["quarantined"] or not end["all_answered"]:
        verdict.findings.append(f"at the end: {end}")


def _fake_scores(of: dict[str, list[dict[str, Any]]], model: Path) -> Scores:
    signatures = {record["version"]: record["signature"] for record in of.get("version", ())}
    signatures["default"] = signature(read_checkpoint(model))

    def scores(version: str, ids_T: list[int]) -> list[float]:
        return [value or 0.0 for value in logprobs(signatures[version], ids_T, VOCAB_SIZE)]

    return scores


def _real_scores(folder: Path, path: Path) -> Scores:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    states = {"default": {name: tensor.clone() for name, tensor in model.state_dict().items()}}
    loaded = "default"

    @torch.no_grad()
    def scores(version: str, ids_T: list[int]) -> list[float]:
        nonlocal loaded
        if version != loaded:
            file = folder / "versions" / f"{version}.pt"
            if version not in states and not file.exists():
                raise KeyError(version)
            model.load_state_dict(states[version] if version in states else torch.load(file))
            loaded = version
        rows = model(torch.tensor([ids_T])).logits[0, :-1].log_softmax(-1)
        return [0.0, *rows.gather(1, torch.tensor(ids_T[1:])[:, None])[:, 0].tolist()]

    return scores
