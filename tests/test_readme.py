"""The README's code runs as it stands, on the run's shared server in place of a large model's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from torchrl.data import Composite, Unbounded
from torchrl.envs import Transform

from torchrl_sglang import AsyncSGLang, SamplingParams
from torchrl_sglang.server import SGLangServer

README = Path(__file__).resolve().parent.parent / "README.md"
PROMPT = [5, 6, 7, 8]


class LengthReward(Transform):
    """What a user brings: a reward per answer, and the end of the conversation."""

    def __init__(self) -> None:
        super().__init__(in_keys=[], out_keys=["reward"])

    def _step(self, tensordict, next_tensordict):
        lengths = [len(answer) for answer in tensordict["text", "response"]]
        next_tensordict["reward"] = torch.tensor(lengths, dtype=torch.float32).reshape(-1, 1, 1)
        for done in ("done", "terminated"):
            next_tensordict[done] = torch.ones_like(next_tensordict[done])
        return next_tensordict

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        reward_spec["reward"] = Unbounded((*reward_spec.shape, 1, 1))
        return reward_spec


def readme_code(substitutions: dict[str, str]) -> str:
    [code] = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    for ours, theirs in substitutions.items():
        assert code.count(ours) == 1, f"the README's code no longer says {ours!r} once"
        code = code.replace(ours, theirs)
    return code


@pytest.mark.timeout(120)
def test_the_code_in_the_readme_trains_and_syncs(pristine_server: SGLangServer, tiny_llama: Path):
    code = readme_code(
        {
            '"Qwen/Qwen3-0.6B"': repr(str(tiny_llama)),
            ', device_map="cuda:2"': "",
            "AsyncSGLang.from_pretrained(MODEL, dp_size=2)": f"AsyncSGLang.connect({pristine_server.url!r})",
            '"max_new_tokens": 256': '"max_new_tokens": 16',
            "total_frames=3200": "total_frames=64",
        }
    )
    untrained = greedy(pristine_server.url)
    seen = []

    def train_step(actor: torch.nn.Module, batch) -> None:
        seen.append((batch.numel(), batch["next", "reward"].mean().item()))
        with torch.no_grad():
            for parameter in actor.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))

    sums = [{"query": f"What is {a} + 2?", "answer": str(a + 2)} for a in range(20)]
    names = {"questions": DataLoader(sums, batch_size=4), "reward": LengthReward(), "train_step": train_step}
    exec(compile(code, str(README), "exec"), names)

    assert [frames for frames, _ in seen] == [32, 32]
    assert all(reward > 0 for _, reward in seen)
    assert version(pristine_server.url) == 2
    with torch.no_grad():
        trained = names["actor"].generate(torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False)[0, len(PROMPT) :]
    assert greedy(pristine_server.url) == trained.tolist(), "the server does not answer as the trained model"
    assert trained.tolist() != untrained


def greedy(url: str) -> list[int]:
    with AsyncSGLang.connect(url) as servers:
        return servers.pool.generate([PROMPT], SamplingParams(max_new_tokens=8, temperature=0))[0].output_ids


def version(url: str) -> int:
    with AsyncSGLang.connect(url) as servers:
        return servers.weight_version
