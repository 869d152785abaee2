"""Tasks that are a TorchRL environment already: GSM8K, MATH, IFEval from a local copy of their data, Countdown."""

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
    """A TorchRL environment that brings its own questions and rewards.

    Attributes:
        env: the class; it writes ``reward``, and ``success`` where it says what is right.
        settings: keyword arguments of the class, such as ``dataset``, the path of a local copy.
        held_out: arguments that are others in evaluations.
    """

    env: type[DatasetChatEnv]
    settings: Mapping[str, Any] = field(default_factory=dict)
    held_out: Mapping[str, Any] = field(default_factory=dict)

    def make(self, tokenizer: Any, *, questions: int, answers: int, seed: int, start: int = 0) -> DatasetChatEnv:
        """The environment, past its first ``start`` questions.

        Args:
            tokenizer: has the chat template.
            questions: per batch.
            answers: per question.
            seed: of the order of questions.
            start: how many questions to leave out: whole batches of them.
        """
        env = self._made(tokenizer, questions, answers, seed, self.settings)
        for _ in range(start // questions):
            env.reset()
        return env

    def make_test(self, tokenizer: Any, *, questions: int, answers: int) -> DatasetChatEnv:
        """The environment for evaluations.

        Raises:
            ConfigError: nothing says how it differs from the one that is trained on.
        """
        require(
            bool(self.held_out),
            "task.held_out must say what evaluations ask, e.g. {dataset: /data/gsm8k-test}: it would be the questions "
            "that are trained on",
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
    """A task by the name of a class in ``torchrl.envs.llm``.

    Args:
        env: ``GSM8KEnv``, ``MATHEnv``, ``IFEvalEnv`` (all of which need the package ``datasets``) or ``CountdownEnv``.
        held_out: arguments that are others in evaluations.
        settings: arguments of the class, e.g. ``{dataset: /data/gsm8k}``.

    Raises:
        ConfigError: no such class.

    Examples:
        >>> torchrl_env(env="CountdownEnv", settings={"num_count": 3}).env.__name__
        'CountdownEnv'
    """
    names = [name for name in dir(torchrl.envs.llm) if name.endswith("Env")]
    found = getattr(torchrl.envs.llm, env, None)
    if not (isinstance(found, type) and issubclass(found, DatasetChatEnv)):
        raise ConfigError(f"torchrl.envs.llm has no environment {env!r} with data.{nearest_name(env, names)}")
    return EnvTask(env=found, settings=dict(settings or {}), held_out=dict(held_out or {}))
