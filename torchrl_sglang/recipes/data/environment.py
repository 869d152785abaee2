"""Build TorchRL environments that ask a task's questions in groups."""

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
    """Make a training environment: each batch holds ``questions`` questions, each repeated ``answers`` times in a row.

    Args:
        task: the questions and their scoring.
        tokenizer: has the chat template.
        questions: number of questions per batch.
        answers: number of answers per question.
        seed: seed of the order of questions.
        start: number of the first question.

    Returns:
        A ``ChatEnv`` of batch size ``(questions * answers,)`` that scores the answers. It writes ``query``, ``answer``
        and ``position`` beside the conversation. For an :class:`EnvTask`, that task's own environment.
    """
    if isinstance(task, EnvTask):
        return task.make(tokenizer, questions=questions, answers=answers, seed=seed, start=start)
    stream = QuestionStream(task.train, seed=seed, start=start)
    reward = RewardTransform(task.score)
    return chat_env(stream.loader(questions), reward, task, tokenizer, questions=questions, answers=answers)


def make_test_env(task: Task | EnvTask, tokenizer: Any, *, questions: int, answers: int) -> TransformedEnv:
    """Make an evaluation environment: every reset asks the first ``questions`` held-out questions.

    Args:
        task: the questions and their scoring.
        tokenizer: has the chat template.
        questions: number of questions; fewer if the task has fewer.
        answers: number of answers per question.

    Raises:
        ConfigError: the task has no held-out questions.
    """
    if isinstance(task, EnvTask):
        return task.make_test(tokenizer, questions=questions, answers=answers)
    held_out: Sequence[Question] = task.held_out[:questions]
    stream = QuestionStream(held_out, seed=None)
    size, reward = len(held_out), RewardTransform(task.score)
    return chat_env(stream.loader(size), reward, task, tokenizer, questions=size, answers=answers)


def chat_env(
    loader: DataLoader[Any], transform: Transform, task: Task, tokenizer: Any, *, questions: int, answers: int
) -> TransformedEnv:
    """Make a ``ChatEnv`` of batch size ``(questions * answers,)`` with a transform that scores the answers.

    Args:
        loader: yields questions.
        transform: runs after each answer.
        task: gives the system prompt.
        tokenizer: has the chat template.
        questions: number of questions asked at the same time.
        answers: number of answers per question.
    """
    env = ChatEnv.from_dataloader(
        loader,
        repeats=answers,
        batch_size=(questions * answers,),
        tokenizer=tokenizer,
        system_prompt=task.system_prompt,
    )
    return env.append_transform(transform)
