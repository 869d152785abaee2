"""Atomic checkpoints: written under another name, then renamed.

A run that is killed at any moment, also while it saves, resumes from the last complete checkpoint.
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

from torchrl_sglang.config.checking import require_number
from torchrl_sglang.disk_space import writing
from torchrl_sglang.errors import ConfigError

__all__ = ["Checkpoint", "Checkpoints", "restore_random_state"]

_FILE = "trainer.pt"
_UNFINISHED = ".unfinished"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """State of a run after a step.

    Attributes:
        step: the last finished step, counted from 1.
        data_position: number of the first question that no finished step has trained on.
        weight_version: version of these weights on the servers.
        modules: name to state dict, without frozen parameters (LoRA).
        optimizer: the optimizer's state dict.
        scheduler: the learning rate scheduler's state dict.
        random_state: see :func:`restore_random_state`.
        extra: further values of a recipe.
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
        """Load the state into modules, optimizer, scheduler and the random generators.

        Raises:
            ConfigError: the checkpoint is of other modules.
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
        folder: holds a folder ``step-<number>`` per checkpoint.
        keep: number of checkpoints to keep; older ones are removed after a newer one is complete.

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
        require_number("keep", keep, whole=True, at_least=1)
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
        """Write a checkpoint of a finished step; see :class:`Checkpoint` for the arguments.

        Returns:
            Its folder.

        Raises:
            StorageError: the disk is full, or can't be written to; earlier checkpoints stay.
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
        unfinished = final.with_name(final.name + _UNFINISHED)
        with writing(
            final, "the checkpoint", incomplete=unfinished, needed_bytes=_num_bytes(state), remains=self._remains()
        ):
            self._clear_unfinished()
            unfinished.mkdir(parents=True)
            with (unfinished / _FILE).open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            final.mkdir(exist_ok=True)
            # One file, replaced in one step: a checkpoint of this step from before stays until this one is complete.
            (unfinished / _FILE).replace(final / _FILE)
            unfinished.rmdir()
        for old in self._finished()[: -self.keep]:
            shutil.rmtree(old)
        return final

    def latest(self) -> Checkpoint | None:
        """Load the last complete checkpoint, on the CPU; ``None`` if there is none."""
        finished = self._finished()
        if not finished:
            return None
        state = torch.load(finished[-1] / _FILE, map_location="cpu", weights_only=True)
        return Checkpoint(**state)

    def clear(self) -> None:
        """Remove all checkpoints, for a new run in this folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _clear_unfinished(self) -> None:
        """Remove what a run that was killed while it saved has left."""
        for path in self.folder.glob(f"step-*{_UNFINISHED}"):
            shutil.rmtree(path, ignore_errors=True)

    def _remains(self) -> str:
        finished = self._finished()
        last = f"The last complete checkpoint is {finished[-1].name}" if finished else "There is no earlier checkpoint"
        return f"{last}; the incomplete one was removed."

    def _finished(self) -> list[Path]:
        found = self.folder.glob("step-*") if self.folder.exists() else []
        complete = [path for path in found if (path / _FILE).is_file()]
        return sorted(path for path in complete if path.name.removeprefix("step-").isdigit())


def random_state() -> dict[str, Any]:
    """States of the random generators that training uses: Python's, torch's, and those of the GPUs."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {"python": [version, list(words), gauss], "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Restore what :func:`random_state` returned; the GPUs' states only on a machine with the same number of GPUs."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(state["torch"])
    if len(state.get("cuda", ())) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(state["cuda"])


def _num_bytes(value: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(_num_bytes, value.values()))
    return sum(map(_num_bytes, value)) if isinstance(value, (list, tuple)) else 0


def _kept(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's state dict without frozen parameters."""
    frozen = {
        name for name, parameter in module.named_parameters(remove_duplicate=False) if not parameter.requires_grad
    }
    return {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}


def _load(name: str, module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    different = set(_kept(module)) ^ set(state)
    if different:
        raise ConfigError(f"the checkpoint's {name} is not this run's: they differ in {sorted(different)[:5]}")
    try:
        module.load_state_dict(dict(state), strict=False)
    except RuntimeError as error:
        raise ConfigError(f"the checkpoint's {name} is not this run's: {error}") from error
