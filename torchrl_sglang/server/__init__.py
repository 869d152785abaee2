"""Servers as child processes: one (:mod:`.process`), or several side by side (:mod:`.fleet`)."""

from torchrl_sglang.server.cpu import cpu_command_args, cpu_environment, needs_cpu_engine
from torchrl_sglang.server.fleet import replicate, start_fleet, stop_fleet
from torchrl_sglang.server.gpus import assign_gpus
from torchrl_sglang.server.router import SGLangRouter
from torchrl_sglang.server.server import SGLangServer

__all__ = [
    "SGLangRouter",
    "SGLangServer",
    "assign_gpus",
    "cpu_command_args",
    "cpu_environment",
    "needs_cpu_engine",
    "replicate",
    "start_fleet",
    "stop_fleet",
]
