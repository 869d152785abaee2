"""What SGLang needs on a machine without a GPU: flags, child environment, and import stand-ins for GPU packages.

The server's Python gets SGLang and its pins from ``cpu_requirements.txt`` beside this file. Packages that exist only
as CUDA builds (Triton, torchvision's operators, sgl-kernel) are replaced by the modules in ``cpu_stand_ins/``, which
only the server process sees, through its own ``PYTHONPATH``. Where the real ones are installed and usable (an AMX
machine with the CPU build of sgl-kernel), ``ServerConfig(env={"PYTHONPATH": ""})`` leaves the stand-ins out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torchrl_sglang.config import ServerConfig
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.model_files import find_local_path
from torchrl_sglang.server.gpus import count_machine_gpus, has_visible_gpu, in_ray_worker

__all__ = ["REQUIREMENTS_PATH", "STAND_INS_PATH", "cpu_command_args", "cpu_environment", "needs_cpu_engine"]

REQUIREMENTS_PATH = Path(__file__).with_name("cpu_requirements.txt")
"""Pins of a CPU server's environment; install torch first, then these with ``--no-deps``."""

STAND_INS_PATH = Path(__file__).with_name("cpu_stand_ins")
"""Folder of import stand-ins, only for the server's ``PYTHONPATH``."""

_KV_CACHE_TOKENS = 8192

# SGLang's CPU engine allocates and frees every layer's activations and every received weight bucket. With glibc's
# defaults each allocation is mapped and unmapped again, and page faults double the time of a weight update.
_KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}


def needs_cpu_engine(config: ServerConfig, environ: Mapping[str, str] | None = None) -> bool:
    """Whether this server runs on SGLang's CPU engine.

    Args:
        config: with ``device="auto"`` the driver decides; CUDA is not initialised in this process.
        environ: this process's environment; ``None`` is ``os.environ``.

    Raises:
        ConfigError: ``device="auto"`` in a Ray worker without a GPU on a machine with GPUs: nobody wants a slow CPU
            server there.

    Examples:
        >>> needs_cpu_engine(ServerConfig(model="m", device="cpu"))
        True
    """
    if config.device != "auto":
        return config.device == "cpu"
    environ = {**(os.environ if environ is None else environ), **config.env}
    num_gpus = count_machine_gpus()
    if config.gpus is not None and num_gpus:
        return False
    visible = has_visible_gpu(environ, num_gpus)
    if num_gpus and not visible and in_ray_worker(environ):
        raise ConfigError(
            f"this machine has {num_gpus} GPU(s), but Ray gave none to this worker. Request some from Ray "
            "(num_gpus=...), name the machine's own with gpus=(...), or set device='cpu'."
        )
    return not visible


def cpu_command_args(config: ServerConfig) -> list[str]:
    """SGLang's command-line words for its CPU engine. Later words (``extra_args``) override them.

    Examples:
        >>> cpu_command_args(ServerConfig(model="m"))[:4]
        ['--device', 'cpu', '--dtype', 'float32']
    """
    kv_cache_tokens = config.max_total_tokens or max(_KV_CACHE_TOKENS, config.context_length or 0)
    return [
        *("--device", "cpu"),
        *("--dtype", config.dtype or "float32"),
        *("--max-total-tokens", str(kv_cache_tokens)),
        *("--mem-fraction-static", str(0.9 if config.mem_fraction_static is None else config.mem_fraction_static)),
        # The other back ends are GPU kernels.
        *("--attention-backend", "torch_native"),
        *("--sampling-backend", "pytorch"),
        "--disable-cuda-graph",
        # Few servers need grammars, and they make the start slower; `--grammar-backend xgrammar` turns them on.
        *("--grammar-backend", "none"),
        "--skip-server-warmup",
        # Without this flag the idle scheduler spins and takes a whole core from the trainer.
        "--sleep-on-idle",
    ]


def cpu_environment(config: ServerConfig, cores: list[int] | None = None) -> dict[str, str]:
    """Environment variables of a CPU server. They override inherited ones; ``config.env`` overrides them.

    Args:
        config: the server.
        cores: CPU cores to use; ``None`` is every core this process may run on.

    Raises:
        ConfigError: ``tp_size`` is larger than the number of cores: each rank needs a core of its own.

    Examples:
        >>> cpu_environment(ServerConfig(model="m", tp_size=2), cores=[0, 1, 2, 3])["SGLANG_CPU_OMP_THREADS_BIND"]
        '0,1|2,3'
    """
    cores = sorted(os.sched_getaffinity(0)) if cores is None else cores
    if config.tp_size > len(cores):
        raise ConfigError(
            f"tp_size={config.tp_size} needs as many CPU cores, one per rank; {len(cores)} available. Lower tp_size."
        )
    per_rank = len(cores) // config.tp_size
    variables = {
        "SGLANG_USE_CPU_ENGINE": "1",
        # A health check that generates takes a second, and fails while generation is paused.
        "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
        # Half of the cores; the trainer gets the rest. With more threads than free cores, waiting OpenMP threads spin
        # and slow down the working ones.
        "OMP_NUM_THREADS": str(max(1, per_rank // 2)),
        "PYTHONPATH": str(STAND_INS_PATH),
        **_KEEP_MEMORY,
    }
    if config.tp_size > 1:
        groups = [cores[rank * per_rank : (rank + 1) * per_rank] for rank in range(config.tp_size)]
        variables["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, group)) for group in groups)
    if find_local_path(config.model) is not None:
        variables["HF_HUB_OFFLINE"] = "1"  # all files are here: no requests to the hub, which may not be reachable
    if _wants_lora(config):
        variables["SGLANG_CPU_STAND_INS_NO_PINNED_MEMORY"] = "1"
    return variables


def _wants_lora(config: ServerConfig) -> bool:
    return any(word.partition("=")[0] in ("--enable-lora", "--lora-paths") for word in config.extra_args)
