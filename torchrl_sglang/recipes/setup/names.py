"""Which setting was meant by a name that a recipe doesn't have."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from torchrl_sglang.config import nearest_name

__all__ = ["meant_setting", "setting_hint"]

# What other trainers call a setting -> ours. Only settings that the recipe has are suggested.
_OTHER_NAMES = {
    "learning_rate": ("train.lr",),
    "actor_lr": ("train.lr",),
    "batch_size": ("train.questions",),
    "train_batch_size": ("train.questions",),
    "prompts_per_step": ("train.questions",),
    "micro_batch_size": ("train.micro_batch",),
    "mini_batch_size": ("train.micro_batch",),
    "per_device_train_batch_size": ("train.micro_batch",),
    "num_steps": ("train.steps",),
    "max_steps": ("train.steps",),
    "total_steps": ("train.steps",),
    "num_epochs": ("train.epochs",),
    "num_train_epochs": ("train.epochs",),
    "ppo_epochs": ("train.epochs",),
    "group_size": ("train.answers",),
    "grpo_size": ("train.answers",),
    "num_generations": ("train.answers",),
    "num_samples": ("train.answers",),
    "max_grad_norm": ("train.clip_norm",),
    "lr_scheduler": ("train.schedule",),
    "lr_scheduler_type": ("train.schedule",),
    "warmup": ("train.warmup_steps",),
    "max_tokens": ("policy.generate_kwargs.max_new_tokens",),
    "max_length": ("policy.generate_kwargs.max_new_tokens",),
    "max_response_length": ("policy.generate_kwargs.max_new_tokens",),
    "max_completion_length": ("policy.generate_kwargs.max_new_tokens",),
    "output": ("run.folder",),
    "out": ("run.folder",),
    "output_dir": ("run.folder",),
    "logger": ("run.loggers",),
    "report_to": ("run.loggers",),
    "save_steps": ("checkpoint.every",),
    "save_every": ("checkpoint.every",),
    "eval_steps": ("evaluate.every",),
    "eval_every": ("evaluate.every",),
    "model_path": ("model",),
    "model_name": ("model",),
    "model_name_or_path": ("model",),
    "dataset": ("task",),
    "num_servers": ("engine.dp_size",),
    "tensor_parallel_size": ("engine.tp_size",),
    "gpu_memory_utilization": ("engine.mem_fraction_static",),
    "max_model_len": ("engine.context_length",),
    "lora_r": ("lora.rank",),
    "lora_rank": ("lora.rank",),
    "lora_alpha": ("lora.alpha",),
    "target_modules": ("lora.targets",),
    "beta": ("ppo.kl_coef",),
    "kl_beta": ("ppo.kl_coef",),
    "clip_range": ("loss.clip_epsilon", "ppo.clip_epsilon"),
    "cliprange": ("loss.clip_epsilon", "ppo.clip_epsilon"),
    "iterations": ("train.steps",),
    "num_questions": ("train.questions",),
    "rollout_n": ("train.answers",),
    "gradient_accumulation_steps": ("train.micro_batch",),
    "grad_clip": ("train.clip_norm",),
    "bf16": ("train.autocast",),
    "dtype": ("engine.dtype",),
    "data": ("task",),
    "max_new_tokens": ("policy.generate_kwargs.max_new_tokens",),
    "temperature": ("policy.generate_kwargs.temperature",),
    "server_url": ("engine.url",),
    "save_total_limit": ("checkpoint.keep",),
    "max_staleness": ("rollouts.max_staleness",),
}


def meant_setting(name: str, known: Sequence[str]) -> str | None:
    """The setting among ``known`` that was meant, or ``None``.

    Args:
        name: dotted or not, with ``-`` or ``_``.
        known: every dotted key of the recipe.

    Examples:
        >>> known = ["model", "train", "train.lr", "train.steps", "critic.lr"]
        >>> [meant_setting(name, known) for name in ("lr", "critc.lr", "step", "train.learning_rate", "xyz")]
        ['train.lr', 'critic.lr', 'train.steps', 'train.lr', None]
    """
    name = name.replace("-", "_")
    if name in known:
        return name
    parent, _, last = name.rpartition(".")
    same_end = sorted((key for key in known if key.rpartition(".")[2] == last), key=_order)
    if parent:  # "critc.lr" means "critic.lr", not "train.lr"
        same_end = difflib.get_close_matches(name, same_end, n=1) or same_end
    other = [key for key in _OTHER_NAMES.get(last.lower(), ()) if key in known]
    found = [*same_end, *other, *difflib.get_close_matches(name, known, n=1)]
    if found:
        return found[0]
    ends = {key.rpartition(".")[2]: key for key in sorted(known, key=_order, reverse=True)}
    close = difflib.get_close_matches(last, list(ends), n=1, cutoff=0.75)
    return ends[close[0]] if close else None


def setting_hint(name: str, known: Sequence[str]) -> str:
    """`` Did you mean 'train.lr'?``, the settings beside it, or an empty string."""
    parent = name.rpartition(".")[0]
    meant = meant_setting(name, [key for key in known if key != parent])
    if meant is not None:
        return f" Did you mean {meant!r}?"
    siblings = [key for key in known if parent and key.rpartition(".")[0] == parent]
    if siblings:
        return f" There are {', '.join(siblings)}."
    return nearest_name(parent, known) if parent else ""


def _order(key: str) -> tuple[bool, int, str]:
    """Settings of the trainer first, then those that lie highest."""
    return (not key.startswith("train."), key.count("."), key)
