"""A recipe that attaches to servers of an earlier run sends its own weights first, so nothing has to be warned of."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from tensordict import TensorDict
from torchrl.data.llm import History

from tests.fake_sglang import FakeServer, FakeSettings
from tests.fake_sglang.model import read_checkpoint
from torchrl_sglang.recipes.setup.config import Arguments, load_config
from torchrl_sglang.recipes.setup.serving import Serving

RECIPE = Path(__file__).resolve().parents[2] / "examples" / "grpo.py"


def config(url: str, model: Path) -> Any:
    verify = "weight_sync_schemes.policy.config={verify: 'off'}"
    return load_config(RECIPE, Arguments(overrides=(f"engine.url={url}", f"model={model}", verify)))


def test_the_recipe_pushes_before_its_first_rollout_and_does_not_warn(tiny_llama: Path) -> None:
    with FakeServer(FakeSettings(model_path=tiny_llama, weight_version="7@old")) as fake, warnings.catch_warnings():
        warnings.filterwarnings("error", ".*earlier run.*")
        with Serving(config(fake.url, tiny_llama)) as serving:
            serving.push_first_weights(read_checkpoint(tiny_llama), resumed_version=None)
            serving.scheme.connect()
            chats = History.from_chats([[{"role": "user", "content": "hi"}]])
            serving.policy(TensorDict({("history", "prompt"): chats}, batch_size=[1]))
        paths = [event["path"] for event in fake.events]
    assert paths.index("/end_weight_update") < paths.index("/generate")


def test_the_settings_of_a_sync_are_given_as_one_dictionary(tmp_path: Path) -> None:
    """As docs/gpu_clusters.md shows it."""
    word = f"weight_sync_schemes.policy.config={{transport: disk, disk_dir: {tmp_path}}}"
    loaded = load_config(RECIPE, Arguments(overrides=(word,)))
    assert dict(loaded.weight_sync_schemes.policy.config) == {"transport": "disk", "disk_dir": str(tmp_path)}
