"""Pushes of a sharded trainer in which one rank fails: what every rank raises or returns. Run by sharded_trainer.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import ClientConfig, SyncConfig
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.weights.sync import WeightSync

__all__ = ["failing_ranks"]

FIRST, LAST = 0, 1


class Faulty(Mapping[str, torch.Tensor]):
    """A model's tensors by name; reading the names raises."""

    def __init__(self, model: nn.Module, error: BaseException) -> None:
        self._tensors = dict(model.named_parameters())
        self._error = error

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def items(self) -> Any:
        raise self._error


def failing_ranks(model: nn.Module, url: str, folder: Path) -> dict[str, str]:
    """What this rank's push did, by what had gone wrong; the last one goes right."""
    rank = dist.get_rank()
    (folder / f"no_folder{rank}").write_text("")
    client = ClientConfig(connect_retries=0)

    def push(*, weights: Any = model, on: str = url, **settings: Any) -> str:
        sync = WeightSync(SGLangPool([SGLangClient(on, client)]), SyncConfig(verify="off", **settings))
        try:
            report = sync.push(weights)
            return "nothing to send" if report is None else "sent"
        except BaseException as error:  # noqa: BLE001  what is tested
            return f"{type(error).__name__}: {error}"
        finally:
            sync.close()

    def push_in_background(weights: Any) -> str:
        sync = WeightSync(SGLangPool([SGLangClient(url, client)]), SyncConfig(verify="off"))
        try:
            sync.push_in_background(weights)
            return "begun"
        except ConfigError as error:
            return str(error)
        finally:
            sync.close()

    def only(failing: int, **wrong: Any) -> dict[str, Any]:
        return wrong if rank == failing else {}

    tensors = model.state_dict()  # after a forward named_parameters() has whole tensors, which FSDP2 frees later
    cases: dict[str, Callable[[], str]] = {
        "the last one reaches no server": lambda: push(**only(LAST, on="http://127.0.0.1:9")),
        "the first one reaches no server": lambda: push(**only(FIRST, on="http://127.0.0.1:9")),
        "the last one has another name_map": lambda: push(**only(LAST, name_map={"no such tensor": "x"})),
        "the last one meets a KeyError": lambda: push(
            **{"weights": tensors, **only(LAST, weights=Faulty(model, KeyError("q_proj")))}
        ),
        "the last one is interrupted": lambda: push(
            **{"weights": tensors, **only(LAST, weights=Faulty(model, KeyboardInterrupt()))}
        ),
        "the first one meets a KeyError": lambda: push(
            **{"weights": tensors, **only(FIRST, weights=Faulty(model, KeyError("q_proj")))}
        ),
        "the first one can't listen": lambda: push(transport="broadcast", master_address="203.0.113.7"),
        "the first one can't write": lambda: push(transport="disk", disk_dir=folder / "no_folder0"),
        "a model in the background": lambda: push_in_background(model),
        "tensors in the background": lambda: push_in_background(tensors),
        "nothing": push,
    }
    results = {}
    for name, case in cases.items():
        results[name] = case()
        dist.barrier()  # a rank that is left waiting in a gather would answer with other data, or not at all
    return results
