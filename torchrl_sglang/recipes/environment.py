"""A task as a TorchRL environment that asks questions in groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchrl.envs import TransformedEnv
from torchrl.envs.llm import ChatEnv

from torchrl_sglang.recipes.questions import Question, QuestionStream
from torchrl_sglang.recipes.rewards import RewardTransform, Scorer
from torchrl_sglang.recipes.tasks import Task
from torchrl_sglang.recipes.torchrl_env import EnvTask

__all__ = ["make_env", "make_test_env"]


def make_env(
    task: Task | EnvTask, tokenizer: Any, *, questions: int, answers: int, seed: int, start: int = 0
) -> TransformedEnv:
    """An environment whose every batch holds ``questions`` questions, ``answers`` times each, one after the other.

    Args:
        task: what is asked and how it is scored.
        tokenizer: has the chat template.
        questions: per batch.
        answers: per question.
        seed: of the order of questions.
        start: number of the first question that is collected.

    Returns:
        A ``ChatEnv`` of batch size ``(questions * answers,)`` with ``query``, ``answer`` and ``position`` beside the
        conversation, and :class:`RewardTransform`; of an :class:`EnvTask` what that makes.
    """
    if isinstance(task, EnvTask):
        return task.make(tokenizer, questions=questions, answers=answers, seed=seed, start=start)
    stream = QuestionStream(task.train, seed=seed, start=start)
    return _env(stream, task.score, task.system_prompt, tokenizer, questions, answers)


def make_test_env(task: Task | EnvTask, tokenizer: Any, *, questions: int, answers: int) -> TransformedEnv:
    """An environment that asks the first ``questions`` held-out questions each time it is reset.

    Args:
        task: what is asked and how it is scored.
        tokenizer: has the chat template.
        questions: how many; fewer where the task has fewer.
        answers: per question.

    Raises:
        ConfigError: the task keeps none apart.
    """
    if isinstance(task, EnvTask):
        return task.make_test(tokenizer, questions=questions, answers=answers)
    held_out: Sequence[Question] = task.held_out[:questions]
    stream = QuestionStream(held_out, seed=None)
    return _env(stream, task.score, task.system_prompt, tokenizer, len(held_out), answers)


def _env(
    stream: QuestionStream, score: Scorer, system_prompt: str | None, tokenizer: Any, questions: int, answers: int
) -> TransformedEnv:
    env = ChatEnv.from_dataloader(
        stream.loader(questions),
        repeats=answers,
        batch_size=(questions * answers,),
        tokenizer=tokenizer,
        system_prompt=system_prompt,
    )
    return env.append_transform(RewardTransform(score))
