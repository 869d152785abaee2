"""Tasks that TorchRL provides as environments: GSM8K, MATH, IFEval (from a local copy of the data), Countdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torchrl.envs.llm
from tensordict import set_list_to_stack
from torchrl.envs.llm import DatasetChatEnv

from torchrl_sglang.config import nearest_name
from torchrl_sglang.config.checking import require
from torchrl_sglang.errors import ConfigError

__all__ = ["EnvTask", "torchrl_env"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvTask:
    """A TorchRL environment that has its own questions and rewards.

    Attributes:
        env: the class; it writes ``reward``, and ``success`` if it knows which answers are right.
        settings: keyword arguments of the class, such as ``dataset``, the path of a local copy.
        held_out: keyword arguments that replace some of ``settings`` in evaluations.
    """

    env: type[DatasetChatEnv]
    settings: Mapping[str, Any] = field(default_factory=dict)
    held_out: Mapping[str, Any] = field(default_factory=dict)

    def make(self, tokenizer: Any, *, questions: int, answers: int, seed: int, start: int = 0) -> DatasetChatEnv:
        """Make the training environment and skip its first ``start`` questions.

        Args:
            tokenizer: has the chat template.
            questions: number of questions per batch.
            answers: number of answers per question.
            seed: seed of the order of questions.
            start: number of questions to skip, rounded down to whole batches.
        """
        env = self._made(tokenizer, questions, answers, seed, self.settings)
        for _ in range(start // questions):
            env.reset()
        return env

    def make_test(self, tokenizer: Any, *, questions: int, answers: int) -> DatasetChatEnv:
        """Make the evaluation environment.

        Raises:
            ConfigError: ``held_out`` is empty, so the environment would ask the training questions.
        """
        require(
            bool(self.held_out),
            "task.held_out must say which questions evaluations ask, e.g. {dataset: /data/gsm8k-test}; without it they "
            "would be the training questions",
        )
        return self._made(tokenizer, questions, answers, 0, {**self.settings, **self.held_out})

    def _made(
        self, tokenizer: Any, questions: int, answers: int, seed: int, settings: Mapping[str, Any]
    ) -> DatasetChatEnv:
        with set_list_to_stack(True):
            return self.env(
                **{
                    "num_envs": questions * answers,
                    "repeats": answers,
                    "batch_size_dl": questions,
                    "seed": seed,
                    "tokenizer": tokenizer,
                    "apply_template": True,
                    **settings,
                }
            )


def torchrl_env(
    *, env: str, held_out: Mapping[str, Any] | None = None, settings: Mapping[str, Any] | None = None
) -> EnvTask:
    """Make a task from the name of a class in ``torchrl.envs.llm``.

    Args:
        env: ``GSM8KEnv``, ``MATHEnv``, ``IFEvalEnv`` (all of which need the package ``datasets``) or ``CountdownEnv``.
        held_out: arguments that replace some of ``settings`` in evaluations.
        settings: keyword arguments of the class, e.g. ``{dataset: /data/gsm8k}``.

    Raises:
        ConfigError: there is no such class.

    Examples:
        >>> torchrl_env(env="CountdownEnv", settings={"num_count": 3}).env.__name__
        'CountdownEnv'
    """
    names = [name for name in dir(torchrl.envs.llm) if name.endswith("Env")]
    found = getattr(torchrl.envs.llm, env, None)
    if not (isinstance(found, type) and issubclass(found, DatasetChatEnv)):
        raise ConfigError(f"torchrl.envs.llm has no environment {env!r} with data.{nearest_name(env, names)}")
    return EnvTask(env=found, settings=dict(settings or {}), held_out=dict(held_out or {}))
