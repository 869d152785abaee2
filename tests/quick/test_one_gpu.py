"""One GPU for trainer and server: what the preset and the minimal example choose with and without a GPU."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from tests.quick.test_engine_memory import GpuServer
from torchrl_sglang import ConfigError, recipes
from torchrl_sglang.hydra_configs import close_engines
from torchrl_sglang.recipes.setup.arguments import parse_arguments
from torchrl_sglang.recipes.setup.config import load_config, save_config

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPE, MINIMAL = EXAMPLES / "grpo.py", EXAMPLES / "grpo_minimal.py"


def load(*words: str, model: object = "/some/model") -> Any:
    return load_config(RECIPE, parse_arguments(RECIPE, [f"model={model}", *words]))


def plain(config: Any) -> dict[str, Any]:
    values: Any = OmegaConf.to_container(config, resolve=True)
    return values


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture(params=[True, False], ids=["on a GPU", "on the CPU"])
def server(request: pytest.FixtureRequest, tiny_llama: Path) -> Iterator[GpuServer]:
    server = GpuServer(tiny_llama, enable_memory_saver=True, device="cuda" if request.param else "cpu")
    yield server
    close_engines()
    server.http.shutdown()


def test_without_a_gpu_the_preset_uses_the_cpu_for_both() -> None:
    if torch.cuda.device_count():
        pytest.skip("this machine has a GPU")
    values = plain(load("--preset", "one-gpu", "train.seed=7"))
    engine = values["engine"]
    assert (engine["device"], engine["dtype"], engine["gpus"], engine["mem_fraction_static"]) == (
        *("cpu", "float32"),
        *(None, None),
    )
    assert [str(word) for word in engine["extra_args"]] == ["--random-seed", "7"]
    assert (values["train"]["device"], values["train"]["autocast"]) == ("cpu", "float32")
    assert values["offload_servers"] is True


@pytest.mark.usefixtures("one_gpu")
def test_with_a_gpu_both_use_the_first_and_the_server_can_release_its_memory() -> None:
    values = plain(load("--preset", "one-gpu", "engine.dtype=float16"))
    engine = values["engine"]
    assert (engine["device"], engine["gpus"], engine["mem_fraction_static"]) == ("cuda", [[0]], 0.5)
    assert engine["dtype"] == "float16", "an override wins"
    assert [str(word) for word in engine["extra_args"]] == ["--random-seed", "0", "--enable-memory-saver"]
    assert (values["train"]["device"], values["train"]["autocast"]) == ("cuda:0", "bfloat16")
    assert values["weight_sync_schemes"]["policy"]["config"] == {"transport": "ipc"}
    assert values["policy"]["engine"] == engine, "policy and engine share one server"


@pytest.mark.usefixtures("one_gpu")
def test_the_preset_with_nccl_lets_two_ranks_share_the_gpu() -> None:
    values = plain(load("--preset", "one-gpu-nccl"))
    assert values["engine"]["env"] == {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}
    assert values["weight_sync_schemes"]["policy"]["config"] == {"transport": "broadcast"}
    assert values["offload_servers"] is True


def test_a_run_that_is_resumed_on_another_machine_chooses_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    save_config(load("--preset", "one-gpu"), tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    resumed = load_config(RECIPE, parse_arguments(RECIPE, ["--resume", str(tmp_path)]))
    assert plain(resumed)["engine"]["device"] == "cpu"


def test_the_servers_are_released_during_training_only_where_they_hold_gpu_memory(
    server: GpuServer, tiny_llama: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    on_gpu = server.read("/server_info")[1]["device"] == "cuda"
    config = load("--preset", "one-gpu", f"engine.url={server.url}", model=tiny_llama)
    with recipes.Serving(config) as serving:
        server.calls.clear()
        with serving.offloaded(False):
            assert not server.released
        assert server.calls == []
        for _ in range(2):
            with serving.offloaded(config.offload_servers):
                assert bool(server.released) is on_gpu
            assert not server.released
        with pytest.raises(ConfigError, match="offload_servers must be true or false, got 'yes'"):
            serving.offloaded("yes")  # type: ignore[arg-type]
    said = capfd.readouterr().err.count("skipped, since the servers run on the CPU and hold no GPU memory")
    assert said == (0 if on_gpu else 1)


def command_line(*words: str) -> dict[str, Any]:
    """Names of the minimal example once its command line is read, before it loads a model."""
    tree = ast.parse(MINIMAL.read_text())
    end = next(i for i, each in enumerate(tree.body) if "manual_seed" in ast.unparse(each))
    tree.body = [each for each in tree.body[:end] if not ast.unparse(each).startswith("MODEL")]
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [MINIMAL.name, *words])
        exec(compile(tree, str(MINIMAL), "exec"), names)
    return names


def test_the_minimal_example_says_why_it_shares_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert command_line()["one_gpu"] is False
    assert capsys.readouterr().out == ""
    names = command_line("--one-gpu")
    assert (names["one_gpu"], names["flags"]) == (False, ("--random-seed", "0"))
    assert "torch finds no GPU, so model and server use the CPU" in capsys.readouterr().out


@pytest.mark.usefixtures("one_gpu")
def test_the_minimal_example_shares_a_gpu_only_when_told_to() -> None:
    assert command_line()["flags"] == ("--random-seed", "0")
    names = command_line("--one-gpu")
    assert (names["one_gpu"], names["flags"]) == (True, ("--random-seed", "0", "--enable-memory-saver"))


@pytest.mark.parametrize("word", ["--one", "--one-gpus", "one-gpu", "train.steps=3"])
def test_the_minimal_example_refuses_unknown_arguments(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_line(word)
    assert f"unrecognized arguments: {word}" in capsys.readouterr().err
