"""Checkpoints that are whole or not there: written aside, then renamed.

A run that is killed at any moment, also while it saves, goes on from the last one that was finished.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchrl_sglang.config.checking import require
from torchrl_sglang.errors import ConfigError

__all__ = ["Checkpoint", "Checkpoints", "restore_random_state"]

_FILE = "trainer.pt"
_UNFINISHED = ".unfinished"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Where a run stood after a step.

    Attributes:
        step: last finished step, counted from 1; 0 before the first.
        data_position: number of the first question that no finished step has trained on.
        weight_version: version of these weights on the servers.
        modules: per name a module's state dict; of one with frozen parameters (LoRA) the trained ones and the buffers.
        optimizer: the optimizer's state dict.
        scheduler: the learning rate scheduler's state dict.
        random_state: what :func:`restore_random_state` takes.
        extra: whatever else a recipe keeps.
    """

    step: int
    data_position: int
    weight_version: int
    modules: Mapping[str, Mapping[str, torch.Tensor]]
    optimizer: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    random_state: Mapping[str, Any]
    extra: Mapping[str, Any] = field(default_factory=dict)

    def restore(self, modules: Mapping[str, nn.Module], optimizer: Any, scheduler: Any) -> None:
        """Put everything back where :meth:`Checkpoints.save` took it from, random states included.

        Raises:
            ConfigError: the checkpoint is of another model.
        """
        if set(modules) != set(self.modules):
            raise ConfigError(f"the checkpoint holds {sorted(self.modules)}, this run has {sorted(modules)}")
        for name, module in modules.items():
            _load(name, module, self.modules[name])
        optimizer.load_state_dict(self.optimizer)
        scheduler.load_state_dict(self.scheduler)
        restore_random_state(self.random_state)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they lie, each a folder ``step-<number>``.
        keep: how many are kept; older ones are removed after a newer one is whole.

    Examples:
        >>> import tempfile
        >>> from torch import nn, optim
        >>> model = nn.Linear(2, 2)
        >>> optimizer = optim.SGD(model.parameters(), lr=0.1)
        >>> scheduler = optim.lr_scheduler.ConstantLR(optimizer)
        >>> checkpoints = Checkpoints(Path(tempfile.mkdtemp()))
        >>> checkpoints.latest() is None
        True
        >>> _ = checkpoints.save(step=3, data_position=12, weight_version=3, modules={"model": model},
        ...                      optimizer=optimizer, scheduler=scheduler)
        >>> checkpoints.latest().step
        3
    """

    def __init__(self, folder: Path, *, keep: int = 1) -> None:
        require(keep >= 1, f"keep at least one checkpoint, got keep={keep}")
        self.folder = folder
        self.keep = keep

    def save(
        self,
        *,
        step: int,
        data_position: int,
        weight_version: int,
        modules: Mapping[str, nn.Module],
        optimizer: Any,
        scheduler: Any,
        extra: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write the checkpoint of a finished step; see :class:`Checkpoint` for the arguments.

        Returns:
            Its folder.
        """
        state = {
            "step": step,
            "data_position": data_position,
            "weight_version": weight_version,
            "modules": {name: _kept(module) for name, module in modules.items()},
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "random_state": random_state(),
            "extra": dict(extra or {}),
        }
        final = self.folder / f"step-{step:06d}"
        aside = final.with_name(final.name + _UNFINISHED)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        with (aside / _FILE).open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        for old in self._finished()[: -self.keep]:
            shutil.rmtree(old)
        return final

    def latest(self) -> Checkpoint | None:
        """The last finished checkpoint, on the CPU; ``None`` when there is none."""
        finished = self._finished()
        if not finished:
            return None
        state = torch.load(finished[-1] / _FILE, map_location="cpu", weights_only=True)
        return Checkpoint(**state)

    def clear(self) -> None:
        """Remove all: a new run starts in this folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _finished(self) -> list[Path]:
        found = self.folder.glob("step-*") if self.folder.exists() else []
        return sorted(path for path in found if path.name.removeprefix("step-").isdigit())


def random_state() -> dict[str, Any]:
    """States of the random generators that training draws from: Python's, torch's, and those of the GPUs."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {"python": [version, list(words), gauss], "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Go on drawing where :func:`random_state` was taken; GPUs' states only on a machine with as many."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(state["torch"])
    if len(state.get("cuda", ())) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(state["cuda"])


def _kept(module: nn.Module) -> dict[str, torch.Tensor]:
    """All of a module's state, without parameters that are frozen."""
    frozen = {
        name for name, parameter in module.named_parameters(remove_duplicate=False) if not parameter.requires_grad
    }
    return {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}


def _load(name: str, module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    missing = set(_kept(module)) ^ set(state)
    if missing:
        raise ConfigError(f"the checkpoint's {name} is not this run's: they differ in {sorted(missing)[:5]}")
    try:
        module.load_state_dict(dict(state), strict=False)
    except RuntimeError as error:
        raise ConfigError(f"the checkpoint's {name} is not this run's: {error}") from error
