"""One rank of a small FSDP2 trainer that opens its weights in every form. Run by test_source_fsdp.py.

python sharded_trainer.py RANK WORLD_SIZE FOLDER  # reads checkpoints FOLDER/<arch>, writes FOLDER/rank<RANK>.pt

FOLDER/url names a server that serves FOLDER/qwen2.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
import transformers
from failing_ranks import failing_ranks
from tensordict import TensorDict
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from torchrl_sglang.errors import ConfigError, WeightCoverageError
from torchrl_sglang.weights.checkpoint.coverage import check_coverage
from torchrl_sglang.weights.checkpoint.headers import Checkpoint
from torchrl_sglang.weights.source.adapter import AdapterSource
from torchrl_sglang.weights.source.factory import open_source
from torchrl_sglang.weights.source.interface import WeightSource
from torchrl_sglang.weights.source.shards import is_sharded, ranks_of_weights


def trained(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard, take one optimiser step, and leave the root unsharded, as a forward pass without backward does."""
    body = next(part for part in model.modules() if isinstance(part, transformers.PreTrainedModel)).model
    for layer in body.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    ids = torch.arange(3, 35)[None]
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(ids, labels=ids).loss.backward()
    optimiser.step()
    optimiser.zero_grad()
    with torch.no_grad():
        model(ids)
    return model


class Trainer:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.flat = init_device_mesh("cpu", (dist.get_world_size(),))
        self.hybrid = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("replicate", "shard"))

    def make(
        self, arch: str, mesh: DeviceMesh | None = None, lora: dict[str, Any] | None = None
    ) -> tuple[nn.Module, Checkpoint]:
        model = transformers.AutoModelForCausalLM.from_pretrained(self.folder / arch, dtype=torch.float32)
        if lora is not None:
            torch.manual_seed(0)
            model = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **lora))
        return trained(model, mesh or self.flat), Checkpoint.read(self.folder / arch)

    def plain(self) -> Any:
        model, checkpoint = self.make("qwen2")
        return self.result(open_source(model, checkpoint), checkpoint, self.whole(model))

    def tied(self) -> Any:
        model, checkpoint = self.make("tied")
        return self.result(open_source(model, checkpoint), checkpoint, self.whole(model))

    def hybrid_mesh(self) -> Any:
        model, checkpoint = self.make("qwen2", mesh=self.hybrid)
        return self.result(open_source(model, checkpoint), checkpoint, self.whole(model))

    def compiled_and_wrapped(self) -> Any:
        model, checkpoint = self.make("qwen2")
        wrapped = nn.ModuleDict({"model": torch.compile(model)})
        return self.result(open_source(wrapped, checkpoint), checkpoint, self.whole(model))

    def tensordict(self) -> Any:
        model, checkpoint = self.make("tied")
        whole = self.whole(model)
        for part in model.modules():
            if hasattr(part, "reshard"):
                part.reshard()
        weights = TensorDict.from_module(nn.ModuleDict({"model": model}))
        return self.result(open_source(weights, checkpoint), checkpoint, whole)

    def moe(self) -> Any:
        model, checkpoint = self.make("moe")
        whole = self.whole(model)
        plain = transformers.AutoModelForCausalLM.from_pretrained(self.folder / "moe", dtype=torch.float32)
        plain.load_state_dict(whole)
        expected = {name: tensor.clone() for name, tensor in open_source(plain, checkpoint).tensors()}
        return self.result(open_source(model, checkpoint), checkpoint, expected)

    def adapters(self) -> Any:
        lora = {"r": 4, "target_modules": ["q_proj", "down_proj"], "use_dora": True}
        model, checkpoint = self.make("qwen2", lora=lora)
        torch.manual_seed(0)
        whole = transformers.AutoModelForCausalLM.from_pretrained(self.folder / "qwen2", dtype=torch.float32)
        twin = peft.get_peft_model(whole, peft.LoraConfig(init_lora_weights=False, **lora))
        twin.load_state_dict(self.whole(model))
        expected = twin.merge_and_unload().state_dict()
        source = open_source(model, checkpoint)
        trainable = [name for name, spec in source.specs().items() if spec.trainable]
        try:
            AdapterSource(model, checkpoint)
        except ConfigError as error:
            refusal = str(error)
        return {**self.result(source, checkpoint, expected), "trainable": trainable, "refusal": refusal}

    def chosen_names(self) -> Any:
        model, checkpoint = self.make("qwen2")
        whole = self.whole(model)
        source = open_source(model, checkpoint)
        names = list(source.specs())[5:2:-1]
        return {"sent": {n: t.clone() for n, t in source.tensors(names)}, "expected": {n: whole[n] for n in names}}

    def stopped_early(self) -> Any:
        """Rank 0 stops after three tensors; the other ranks still read all of them."""
        model, checkpoint = self.make("qwen2")
        tensors = open_source(model, checkpoint).tensors()
        count = 0
        for _ in tensors:
            count += 1
            if dist.get_rank() == 0 and count == 3:
                break
        tensors.close()
        dist.barrier()
        return {"count": count, "total": len(checkpoint.specs)}

    def infinity_on_the_last_rank(self) -> Any:
        model, checkpoint = self.make("qwen2")
        source = open_source(model, checkpoint)  # reshards the root
        if dist.get_rank() == dist.get_world_size() - 1:
            with torch.no_grad():
                model.model.layers[1].mlp.up_proj.weight.to_local()[-1, -1] = torch.inf
        try:
            source.check_values()
        except WeightCoverageError as error:
            return {"refused": error.mismatched}
        return {"refused": ()}

    def root_alone(self) -> Any:
        """Only the root is sharded, and a forward pass has left it whole."""
        model = transformers.AutoModelForCausalLM.from_pretrained(self.folder / "qwen2", dtype=torch.float32)
        fully_shard(model, mesh=self.flat)
        with torch.no_grad():
            model(torch.arange(3, 35)[None])
        return {"was_whole": not is_sharded(model), "has_ranks": ranks_of_weights(model) is not None}

    def failing_ranks(self) -> Any:
        model, _ = self.make("qwen2")
        return failing_ranks(model, (self.folder / "url").read_text(), self.folder)

    def whole(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) or {}

    def result(self, source: WeightSource, checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> dict[str, Any]:
        check_coverage(source.specs(), checkpoint)
        source.check_values()
        sent = {name: tensor.clone() for name, tensor in source.tensors()}
        again = {name: tensor.clone() for name, tensor in source.tensors()}
        assert all(torch.equal(sent[name], again[name]) for name in sent)
        return {"sent": sent, "expected": expected, "is_sender": source.is_sender}


SCENARIOS: tuple[Callable[[Trainer], Any], ...] = (
    Trainer.plain,
    Trainer.tied,
    Trainer.hybrid_mesh,
    Trainer.compiled_and_wrapped,
    Trainer.tensordict,
    Trainer.moe,
    Trainer.adapters,
    Trainer.chosen_names,
    Trainer.stopped_early,
    Trainer.infinity_on_the_last_rank,
    Trainer.root_alone,
    Trainer.failing_ranks,
)


def main(rank: int, world_size: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), world_size)
    # The trainer's default group. The source must neither change it nor need another.
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=120)
    )
    trainer = Trainer(folder)
    torch.save({scenario.__name__: scenario(trainer) for scenario in SCENARIOS}, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
