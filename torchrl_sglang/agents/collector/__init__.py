"""Runs agents on tasks through a gateway, and yields what their model sampled as a TorchRL collector does."""

from torchrl_sglang.agents.collector.advantages import group_advantages
from torchrl_sglang.agents.collector.collector import AgentCollector
from torchrl_sglang.agents.collector.failures import RunFailure
from torchrl_sglang.agents.collector.trajectory_batch import trajectories_to_batch

__all__ = ["AgentCollector", "RunFailure", "group_advantages", "trajectories_to_batch"]
