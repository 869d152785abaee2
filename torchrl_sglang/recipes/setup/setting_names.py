"""Suggests the setting that was meant by an unknown one: other trainers' names, a missing node, a typing error."""

from __future__ import annotations

from collections.abc import Sequence

from torchrl_sglang.config import nearest_name

__all__ = ["suggest_setting"]

# What other trainers call a setting -> ours.
_OTHER_NAMES = {
    "learning_rate": "train.lr",
    "max_steps": "train.steps",
    "num_steps": "train.steps",
    "total_steps": "train.steps",
    "iterations": "train.steps",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "batch_size": "train.questions",
    "train_batch_size": "train.questions",
    "num_questions": "train.questions",
    "prompts_per_step": "train.questions",
    "group_size": "train.answers",
    "num_generations": "train.answers",
    "num_samples": "train.answers",
    "rollout_n": "train.answers",
    "grpo_size": "train.answers",
    "micro_batch_size": "train.micro_batch",
    "mini_batch_size": "train.micro_batch",
    "per_device_train_batch_size": "train.micro_batch",
    "gradient_accumulation_steps": "train.micro_batch",
    "max_grad_norm": "train.clip_norm",
    "grad_clip": "train.clip_norm",
    "lr_scheduler": "train.schedule",
    "lr_scheduler_type": "train.schedule",
    "warmup": "train.warmup_steps",
    "bf16": "train.autocast",
    "dtype": "engine.dtype",
    "model_path": "model",
    "model_name": "model",
    "model_name_or_path": "model",
    "dataset": "task",
    "data": "task",
    "max_tokens": "policy.generate_kwargs.max_new_tokens",
    "max_new_tokens": "policy.generate_kwargs.max_new_tokens",
    "max_completion_length": "policy.generate_kwargs.max_new_tokens",
    "temperature": "policy.generate_kwargs.temperature",
    "num_servers": "engine.dp_size",
    "tensor_parallel_size": "engine.tp_size",
    "server_url": "engine.url",
    "eval_steps": "evaluate.every",
    "eval_every": "evaluate.every",
    "save_steps": "checkpoint.every",
    "save_every": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "output_dir": "run.folder",
    "output": "run.folder",
    "report_to": "run.loggers",
}


def suggest_setting(key: str, known: Sequence[str]) -> str:
    """The end of an error about an unknown setting.

    Args:
        key: what was given, with dots between its parts.
        known: the settings that there are.

    Returns:
        A sentence that begins with a blank; empty if nothing is near.

    Examples:
        >>> known = ["model", "train", "train.lr", "train.steps"]
        >>> suggest_setting("train.learning_rate", known), suggest_setting("steps", known)
        (" Did you mean 'train.lr'?", " Did you mean 'train.steps'?")
    """
    parent, _, name = key.rpartition(".")
    meant = [_OTHER_NAMES[name]] if name in _OTHER_NAMES else []
    meant += [one for one in known if one.rpartition(".")[2] == name]
    found = next((one for one in meant if one in known), None)
    if found is not None:
        return f" Did you mean {found!r}?"
    hint = nearest_name(key, [one for one in known if one != parent])
    siblings = [one for one in known if one.rpartition(".")[0] == parent]
    if not hint and parent and siblings:
        return f" There are {', '.join(siblings)}."
    return hint
