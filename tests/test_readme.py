"""The README's code is examples/grpo_minimal.py, which trains on a real server; docs/comparison.md names real tests."""

from __future__ import annotations

import ast
import re
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict, lazy_stack
from torchrl.objectives.llm import MCAdvantage

from torchrl_sglang import AsyncSGLang, SamplingParams
from torchrl_sglang.server import SGLangServer

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "grpo_minimal.py"
PROMPT = [5, 6, 7, 8]
ANSWERS, FRAMES = 8, 32  # of the example: answers to a question, answers in a step


def example_code(substitutions: dict[str, str]) -> str:
    code = EXAMPLE.read_text()
    for original, replacement in substitutions.items():
        assert code.count(original) == 1, f"{EXAMPLE.name} no longer contains {original!r} exactly once"
        code = code.replace(original, replacement)
    return code


@pytest.fixture(scope="module")
def example_names() -> dict[str, Any]:
    """What the example imports and defines, without the statements that load a model and launch a server."""
    kept = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    tree = ast.parse(EXAMPLE.read_text())
    tree.body = [statement for statement in tree.body if isinstance(statement, kept)]
    names: dict[str, Any] = {}
    exec(compile(tree, str(EXAMPLE), "exec"), names)
    return names


def advantages_in_the_example(rewards_by_group: list[list[float]]) -> torch.Tensor:
    """What the example's loop writes for these rewards, as ``(groups, answers)``: its statements before the loss."""
    loops = [node for node in ast.walk(ast.parse(EXAMPLE.read_text())) if isinstance(node, ast.For)]
    [body] = [loop.body for loop in loops if ast.unparse(loop.target) == "rollout"]
    inner = next(i for i, statement in enumerate(body) if isinstance(statement, (ast.For, ast.With)))
    size, count = len(rewards_by_group[0]), sum(map(len, rewards_by_group))
    rows = [
        TensorDict(
            {"query": f"question {i}", "next": {"reward": torch.tensor([[reward]]), "done": torch.tensor([True])}}
        )
        for i, rewards in enumerate(rewards_by_group)
        for reward in rewards
    ]
    names = {
        "MCAdvantage": MCAdvantage,
        "ANSWERS": size,
        "rollout": lazy_stack(rows),
        "model": SimpleNamespace(device="cpu"),
    }
    exec(compile(ast.Module(body[:inner], []), str(EXAMPLE), "exec"), names)
    advantage: torch.Tensor = names["batch"]["advantage"]  # type: ignore[index]
    assert advantage.shape == (count, 1, 1)
    return advantage.reshape(-1, size)


def test_the_code_in_the_readme_is_the_minimal_example() -> None:
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert code == EXAMPLE.read_text(), "copy examples/grpo_minimal.py into the README's python block"


def test_the_minimal_example_is_short_and_uses_only_the_package_root() -> None:
    code = EXAMPLE.read_text()
    modules = {node.module for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)}
    assert len(code.splitlines()) <= 84
    assert {module for module in modules if module and module.startswith("torchrl_sglang")} == {"torchrl_sglang"}


@pytest.mark.parametrize(
    ("answer", "ended", "expected"),
    [
        ("7", True, 1.0),
        ("5 + 2 = 7", False, 0.7 + 0.2 * 3 / 9),
        ("5 + 2 = 8", True, 0.2 * 3 / 9 + 0.1),
        ("I don't know", True, 0.0),
        ("", True, 0.0),
    ],
)
def test_the_example_scores_answers_as_the_quick_start_does(
    example_names: dict[str, Any], answer: str, ended: bool, expected: float
) -> None:
    assert example_names["reward"](answer, "7", ended) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("size", [2, 5, 8, 12])
def test_a_group_with_equal_rewards_has_no_advantage_in_the_example(size: int) -> None:
    equal = [[0.7 + 0.2 / length] * size for length in range(1, 60)]
    found = advantages_in_the_example([*equal, [0.85] * (size - 1) + [0.1], [0.0] * size])
    assert torch.equal(found[:-2], torch.zeros(len(equal), size))
    assert torch.equal(found[-1], torch.zeros(size))
    mean, deviation = statistics.mean([0.85] * (size - 1) + [0.1]), statistics.stdev([0.85] * (size - 1) + [0.1])
    expected = [(0.85 - mean) / deviation] * (size - 1) + [(0.1 - mean) / deviation]
    assert found[-2].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.timeout(120)
def test_the_minimal_example_trains_and_syncs(
    pristine_server: SGLangServer,
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Two of five answers of the random model contain a digit, so all 64 go without a reward once in 10^14 runs. The
    # learning rate is high because two steps must change a greedy answer.
    code = example_code(
        {
            "str(smollm2_checkpoint())": repr(str(tiny_llama)),
            "STEPS, BATCH, ANSWERS = 16": "STEPS, BATCH, ANSWERS = 2",
            "AsyncSGLang.from_pretrained(MODEL, extra_args=flags, mem_fraction_static=0.5 if one_gpu else None)": (
                f"AsyncSGLang.connect({pristine_server.url!r})"
            ),
            "lr=1e-5": "lr=1e-2",
            "            optimizer.step()": "            seen.append(batch)\n            optimizer.step()",
        }
    )
    monkeypatch.setattr("sys.argv", [EXAMPLE.name])
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # the example sets it; the fixture removes it again
    untrained = greedy(pristine_server.url)
    names: dict[str, Any] = {"seen": []}
    exec(compile(code, str(EXAMPLE), "exec"), names)

    batches = names["seen"]
    rewards = torch.cat([batch["next", "reward"] for batch in batches])
    assert [batch.numel() for batch in batches] == [FRAMES, FRAMES]
    assert rewards.shape == (2 * FRAMES, 1, 1)
    assert all(batch["next", "done"].all() for batch in batches)
    assert all(len(set(batch["query"][i : i + ANSWERS])) == 1 for batch in batches for i in range(0, FRAMES, ANSWERS))
    assert rewards.max() > 0
    assert torch.cat([batch["advantage"] for batch in batches]).abs().max() > 0
    assert names["loss"].ESS.item() == pytest.approx(1, abs=1e-3), "server and trainer disagree on log-probs"
    lines = capsys.readouterr().out.splitlines()
    assert [re.match(r"weights v(\d+)  reward \d\.\d+  ESS \d\.\d+  \d+ s$", line)[1] for line in lines] == ["1", "2"]  # type: ignore[index]

    assert version(pristine_server.url) == 2
    with torch.no_grad():
        trained = names["model"].generate(torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False)[0, len(PROMPT) :]
    assert greedy(pristine_server.url) == trained.tolist(), "the server does not answer as the trained model"
    assert trained.tolist() != untrained


def greedy(url: str) -> list[int]:
    with AsyncSGLang.connect(url) as servers:
        return servers.pool.generate([PROMPT], SamplingParams(max_new_tokens=8, temperature=0))[0].output_ids


def version(url: str) -> int:
    with AsyncSGLang.connect(url) as servers:
        return servers.weight_version


def test_every_test_named_in_the_comparison_exists() -> None:
    sources: dict[str, str] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):  # files of the same name in two folders count as one
        sources[path.name] = sources.get(path.name, "") + path.read_text()
    page = (ROOT / "docs" / "comparison.md").read_text()
    named = re.findall(r"`(test_\w+\.py|…(?=::))(?:::(test_\w+)(…?))?`", page)
    assert len(named) > 80, "the pattern finds no names"
    unknown, file = [], ""
    for name, test, cut in named:
        file = file if name == "…" else name
        if file not in sources or (test and not re.search(rf"def {test}{'' if cut else '[(]'}", sources[file])):
            unknown.append(f"{file}::{test}{cut}")
    assert unknown == []
