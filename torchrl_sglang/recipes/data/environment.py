"""A task as a TorchRL environment that asks questions in groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import DataLoader
from torchrl.envs import Transform, TransformedEnv
from torchrl.envs.llm import ChatEnv

from torchrl_sglang.recipes.data.questions import Question, QuestionStream
from torchrl_sglang.recipes.data.rewards import RewardTransform
from torchrl_sglang.recipes.data.tasks import Task
from torchrl_sglang.recipes.data.torchrl_env import EnvTask

__all__ = ["chat_env", "make_env", "make_test_env"]


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
    reward = RewardTransform(task.score)
    return chat_env(stream.loader(questions), reward, task, tokenizer, questions=questions, answers=answers)


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
    asked, reward = len(held_out), RewardTransform(task.score)
    return chat_env(stream.loader(asked), reward, task, tokenizer, questions=asked, answers=answers)


def chat_env(
    loader: DataLoader[Any], transform: Transform, task: Task, tokenizer: Any, *, questions: int, answers: int
) -> TransformedEnv:
    """A ``ChatEnv`` of batch size ``(questions * answers,)`` with the transform that answers and scores.

    Args:
        loader: yields questions.
        transform: what happens after each answer.
        task: its system prompt.
        tokenizer: has the chat template.
        questions: asked at the same time...
        answers: ...so many times each.
    """
    env = ChatEnv.from_dataloader(
        loader,
        repeats=answers,
        batch_size=(questions * answers,),
        tokenizer=tokenizer,
        system_prompt=task.system_prompt,
    )
    return env.append_transform(transform)
