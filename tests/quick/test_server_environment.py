"""The environment of a server: inherited without the trainer's rank; the trainer's own is never written."""

from __future__ import annotations

import os

import pytest

from torchrl_sglang.config import ServerConfig
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.server.cpu import STAND_INS_PATH, cpu_environment, needs_cpu_engine
from torchrl_sglang.server.environment import PLUGIN_PATH, child_environment
from torchrl_sglang.server.fleet import replicate
from torchrl_sglang.server.gpus import assign_gpus, has_visible_gpu, visible_devices

TORCHRUN = {
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "3",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "0",
    "ROLE_RANK": "3",
    "ROLE_NAME": "default",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


def environment(config: ServerConfig, parent: dict[str, str], *, cpu: bool = False) -> dict[str, str]:
    return child_environment(config, parent, cpu=cpu, same_python=config.python is None)


@pytest.mark.parametrize("cpu", [False, True])
def test_a_server_started_under_torchrun_does_not_know_the_trainers_rank(cpu: bool) -> None:
    variables = environment(ServerConfig(model="m"), {**TORCHRUN, "RAY_JOB_ID": "1", "HOME": "/h"}, cpu=cpu)
    assert not variables.keys() & {*TORCHRUN, "RAY_JOB_ID"}
    assert variables["HOME"] == "/h"


def test_nccl_settings_pass_so_that_both_sides_agree() -> None:
    settings = {"NCCL_CUMEM_ENABLE": "1", "NCCL_NVLS_ENABLE": "1", "NCCL_DEBUG": "INFO"}
    assert environment(ServerConfig(model="m"), settings).items() >= settings.items()


@pytest.mark.parametrize("cpu", [False, True])
def test_the_configs_env_overrides_everything_and_the_parents_stays_unchanged(cpu: bool) -> None:
    parent = {"A": "parent", "OMP_NUM_THREADS": "1", "PYTHONPATH": "/mine"}
    before = dict(parent)
    real = dict(os.environ)
    config = ServerConfig(
        model="m", env={"A": "config", "OMP_NUM_THREADS": "7", "MASTER_ADDR": "wanted", "PYTHONPATH": ""}
    )
    variables = environment(config, parent, cpu=cpu)
    assert [variables[name] for name in config.env] == ["config", "7", "wanted", ""]
    assert parent == before
    assert dict(os.environ) == real


def test_a_crashed_server_ends_at_once_unless_dumps_are_requested() -> None:
    name = "SGLANG_CUDA_COREDUMP_BEFORE_CRASH"
    assert environment(ServerConfig(model="m"), {})[name] == "0"
    assert environment(ServerConfig(model="m"), {name: "1"})[name] == "1"


def test_another_python_does_not_inherit_the_module_path() -> None:
    parent = {"PYTHONPATH": "/mine", "PYTHONHOME": "/p", "VIRTUAL_ENV": "/v"}
    same = environment(ServerConfig(model="m"), parent)
    assert [same[name].partition(":")[0] for name in parent] == ["/mine", "/p", "/v"]
    other = environment(ServerConfig(model="m", python="/other/python"), parent)
    assert other["PYTHONPATH"] == str(PLUGIN_PATH)
    assert not other.keys() & {"PYTHONHOME", "VIRTUAL_ENV"}


def test_only_a_cpu_server_sees_the_stand_ins_and_sees_them_first() -> None:
    assert environment(ServerConfig(model="m"), {"PYTHONPATH": "/mine"})["PYTHONPATH"] == f"/mine:{PLUGIN_PATH}"
    assert environment(ServerConfig(model="m"), {"PYTHONPATH": "/mine"}, cpu=True)["PYTHONPATH"] == (
        f"{STAND_INS_PATH}:/mine:{PLUGIN_PATH}"
    )
    assert (STAND_INS_PATH / "triton" / "__init__.py").is_file()
    assert str(STAND_INS_PATH) not in os.environ.get("PYTHONPATH", "")


def test_a_cpu_server_hides_gpus_from_sglang() -> None:
    assert (
        environment(ServerConfig(model="m", device="cpu"), {"CUDA_VISIBLE_DEVICES": "0"}, cpu=True)[
            "CUDA_VISIBLE_DEVICES"
        ]
        == ""
    )


def test_each_cpu_rank_has_its_own_cores() -> None:
    variables = cpu_environment(ServerConfig(model="m", tp_size=2), cores=[0, 1])
    assert variables["SGLANG_CPU_OMP_THREADS_BIND"] == "0|1"
    assert variables["OMP_NUM_THREADS"] == "1"
    uneven = cpu_environment(ServerConfig(model="m", tp_size=2), cores=[2, 5, 6, 7, 9])
    assert uneven["SGLANG_CPU_OMP_THREADS_BIND"] == "2,5|6,7"
    assert cpu_environment(ServerConfig(model="m"), cores=list(range(8)))["OMP_NUM_THREADS"] == "4"
    assert "SGLANG_CPU_OMP_THREADS_BIND" not in cpu_environment(ServerConfig(model="m"), cores=[0, 1])


def test_more_ranks_than_cores_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"tp_size=3 needs as many CPU cores.*2 available"):
        cpu_environment(ServerConfig(model="m", tp_size=3), cores=[0, 1])


@pytest.mark.parametrize(
    ("extra_args", "patched"),
    [((), False), (("--enable-lora",), True), (("--lora-paths=a=/x",), True), (("--enable-lora-x",), False)],
)
def test_torch_is_patched_for_lora_alone(extra_args: tuple[str, ...], patched: bool) -> None:
    variables = cpu_environment(ServerConfig(model="m", extra_args=extra_args), cores=[0])
    assert ("SGLANG_CPU_STAND_INS_NO_PINNED_MEMORY" in variables) is patched


def test_a_hub_model_may_be_downloaded_and_a_local_one_needs_no_network(tmp_path: object) -> None:
    assert cpu_environment(ServerConfig(model=str(tmp_path)), cores=[0])["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in cpu_environment(ServerConfig(model="Qwen/Qwen3-0.6B"), cores=[0])


@pytest.mark.parametrize(
    ("listed", "gpus", "tp_size", "expected"),
    [
        (None, None, 2, None),
        (None, (2, 3), 2, "2,3"),
        ("4,5,6,7", (2, 3), 2, "6,7"),
        ("4,5", None, 2, "4,5"),
        ("GPU-aa,GPU-bb", (1,), 1, "GPU-bb"),
    ],
)
def test_gpus_count_as_the_launching_process_does(
    listed: str | None, gpus: tuple[int, ...] | None, tp_size: int, expected: str | None
) -> None:
    parent = {} if listed is None else {"CUDA_VISIBLE_DEVICES": listed}
    assert visible_devices(parent, gpus, tp_size) == expected
    config = ServerConfig(model="m", device="cuda", gpus=gpus, tp_size=tp_size)
    assert environment(config, parent).get("CUDA_VISIBLE_DEVICES") == expected


def test_a_gpu_that_is_not_visible_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"needs GPU 2 .*'4,5' shows only 2"):
        visible_devices({"CUDA_VISIBLE_DEVICES": "4,5"}, (1, 2), 2)
    with pytest.raises(ConfigError, match=r"needs GPU 1 .*'4' shows only 1"):
        visible_devices({"CUDA_VISIBLE_DEVICES": "4"}, None, 2)


def test_gpus_in_a_ray_worker_are_the_machines_numbers() -> None:
    ray = {"CUDA_VISIBLE_DEVICES": "0", "RAY_JOB_ID": "01000000"}
    assert visible_devices(ray, (2, 3), 2) == "2,3"
    assert visible_devices(ray, None, 1) == "0"
    with pytest.raises(ConfigError, match="ask Ray for GPUs"):
        visible_devices(ray, None, 2)


@pytest.mark.parametrize(
    ("variables", "num_gpus", "visible"),
    [
        ({}, 0, False),
        ({}, 1, True),
        ({"CUDA_VISIBLE_DEVICES": ""}, 1, False),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 1, False),
        ({"CUDA_VISIBLE_DEVICES": "0"}, 1, True),
    ],
)
def test_hidden_gpus_are_not_visible(variables: dict[str, str], num_gpus: int, visible: bool) -> None:
    assert has_visible_gpu(variables, num_gpus) is visible


def test_an_explicit_device_decides_without_a_driver_call() -> None:
    assert needs_cpu_engine(ServerConfig(model="m", device="cpu"), {})
    assert not needs_cpu_engine(ServerConfig(model="m", device="cuda"), {"CUDA_VISIBLE_DEVICES": ""})
    assert needs_cpu_engine(ServerConfig(model="m"), {"CUDA_VISIBLE_DEVICES": ""})
    assert needs_cpu_engine(ServerConfig(model="m", env={"CUDA_VISIBLE_DEVICES": ""}), {})


def test_gpus_of_several_servers_are_disjoint() -> None:
    assert assign_gpus(3, 2) == ((0, 1), (2, 3), (4, 5))
    assert assign_gpus(2, 2, [[0, 2], [1, 3]]) == ((0, 2), (1, 3))
    for wrong, message in (
        ([[0]], "one list per server, 2"),
        ([[0, 1], [2]], r"tp_size=2 GPUs, got \[2\]"),
        ([[0, 1], [1, 2]], "GPU 1 is given"),
        ([[0, 0], [1, 2]], "GPU 0 is given"),
    ):
        with pytest.raises(ConfigError, match=message):
            assign_gpus(2, 2, wrong)


def test_replicas_on_a_cpu_share_the_cores_and_refuse_what_cannot_be_shared() -> None:
    config = ServerConfig(model="m", device="cpu", env={"A": "1"})
    first, second = replicate(config, 2)
    assert first == second
    assert first.env == {"A": "1", "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // 4))}
    assert replicate(config, 1) == (config,)
    with pytest.raises(ConfigError, match="can't share port 31150"):
        replicate(ServerConfig(model="m", device="cpu", port=31150), 2)
    with pytest.raises(ConfigError, match="run on the CPU"):
        replicate(config, 2, [[0], [1]])
    with pytest.raises(ConfigError, match="not the same GPUs"):
        replicate(ServerConfig(model="m", device="cuda", gpus=(0,)), 2)
    with pytest.raises(ConfigError, match="at least 1"):
        replicate(config, 0)
