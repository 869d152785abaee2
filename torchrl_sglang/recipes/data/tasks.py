"""What a model is trained on: questions to train with, others to be tested with, and how answers are scored."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torchrl.envs.llm import CountdownEnv

from torchrl_sglang.config import nearest_name
from torchrl_sglang.config.checking import require
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.recipes.data.questions import Question
from torchrl_sglang.recipes.data.rewards import Scorer, score_countdown, score_exact, score_number, score_sum
from torchrl_sglang.recipes.data.torchrl_env import EnvTask, torchrl_env

__all__ = ["Task", "arithmetic", "countdown", "jsonl", "make_task", "python_sums", "read_jsonl"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Questions and how answers are scored.

    Attributes:
        train: questions to train on.
        held_out: questions that are only asked in evaluations; none of them is among ``train``.
        score: the scoring function.
        system_prompt: said before every question; ``""`` says nothing, and keeps a chat template from putting its own.
    """

    train: Sequence[Question]
    held_out: Sequence[Question]
    score: Scorer
    system_prompt: str | None = ""


def arithmetic(*, largest: int = 9, held_out: int = 16, seed: int = 0) -> Task:
    """Sums of two numbers from 1 to ``largest``; see :func:`score_sum` for the reward.

    Args:
        largest: the largest number.
        held_out: how many of the ``largest ** 2`` sums are kept for evaluation.
        seed: which ones.

    Examples:
        >>> task = arithmetic(largest=3, held_out=2)
        >>> len(task.train), task.train[0].query, task.train[0].answer
        (7, 'What is 1 + 2? Answer with only the number.', '3')
    """
    sums = [
        Question(query=f"What is {a} + {b}? Answer with only the number.", answer=str(a + b))
        for a in range(1, largest + 1)
        for b in range(1, largest + 1)
    ]
    train, tests = split(sums, held_out, seed)
    return Task(train=train, held_out=tests, score=score_sum)


def python_sums(
    *, smallest: int = 100, largest: int = 999, questions: int = 1024, held_out: int = 16, seed: int = 0
) -> Task:
    """Sums for a model that may run Python (``grpo_tools.py``); too large for a small one to do in its head.

    Args:
        smallest: the smallest number.
        largest: the largest number.
        questions: how many are drawn to train on.
        held_out: how many are kept for evaluation.
        seed: what is drawn.

    Examples:
        >>> task = python_sums(questions=2, held_out=1)
        >>> len(task.train), task.train[0].query
        (2, 'Write a Python code block that prints 633 + 160.')
    """
    require(1 <= smallest < largest, f"smallest must be at least 1 and below largest, got {smallest} and {largest}")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(smallest, largest + 1, (2 * (questions + held_out), 2), generator=generator).tolist()
    pairs = list(dict.fromkeys(map(tuple, drawn)))[: questions + held_out]
    require(len(pairs) > held_out, f"only {len(pairs)} different sums were drawn: lower held_out={held_out}")
    made = [Question(query=f"Write a Python code block that prints {a} + {b}.", answer=str(a + b)) for a, b in pairs]
    return Task(train=made[held_out:], held_out=made[:held_out], score=score_number)


def countdown(
    *,
    numbers: int = 3,
    largest: int = 20,
    largest_target: int = 100,
    questions: int = 1024,
    held_out: int = 32,
    seed: int = 0,
) -> Task:
    """TorchRL's Countdown: reach a target with given numbers, each used at most once.

    Args:
        numbers: how many numbers are given.
        largest: the largest of them.
        largest_target: the largest target.
        questions: how many are drawn to train on.
        held_out: how many are kept for evaluation.
        seed: what is drawn.
    """
    env = CountdownEnv(
        num_count=numbers,
        max_number=largest,
        max_target=largest_target,
        seed=seed,
        num_envs=questions + held_out,
        compute_reward=False,
    )
    drawn = env.reset()
    pairs = dict(zip(list(drawn["query"]), list(drawn["answer"]), strict=True))  # a question drawn twice is one
    made = [Question(query=query, answer=answer) for query, answer in pairs.items()]
    require(len(made) > held_out, f"only {len(made)} different questions can be drawn: lower held_out={held_out}")
    return Task(
        train=made[held_out:],
        held_out=made[:held_out],
        score=score_countdown,
        system_prompt=CountdownEnv.SYSTEM_PROMPT,
    )


SCORERS: dict[str, Scorer] = {"number": score_number, "exact": score_exact, "sum": score_sum}


def jsonl(
    *,
    path: str,
    prompt_key: str = "prompt",
    answer_key: str = "answer",
    score: str = "number",
    held_out: int = 64,
    held_out_path: str | None = None,
    system_prompt: str = "",
    seed: int = 0,
) -> Task:
    """Questions from a file with a JSON object per line; GSM8K's own files, for one, with ``prompt_key=question``.

    Args:
        path: the file.
        prompt_key: which field is the question.
        answer_key: which field is the truth.
        score: ``number``, ``exact`` or ``sum``: see :mod:`torchrl_sglang.recipes.data.rewards`.
        held_out: how many lines are kept for evaluation, unless...
        held_out_path: ...they come from a file of their own.
        system_prompt: said before every question.
        seed: which lines are kept.

    Raises:
        ConfigError: no such file, a line that isn't what it should be (by number), or an unknown ``score``.
    """
    if score not in SCORERS:
        raise ConfigError(f"unknown score {score!r}.{nearest_name(score, list(SCORERS))} There are {list(SCORERS)}")
    questions = read_jsonl(Path(path), prompt_key, answer_key)
    if held_out_path is not None:
        train, tests = questions, read_jsonl(Path(held_out_path), prompt_key, answer_key)
    else:
        train, tests = split(questions, held_out, seed)
    return Task(train=train, held_out=tests, score=SCORERS[score], system_prompt=system_prompt)


def read_jsonl(path: Path, prompt_key: str, answer_key: str) -> list[Question]:
    """Questions of a JSONL file; empty lines don't count.

    Raises:
        ConfigError: no such file, or a line that is no JSON object with both keys.
    """
    if not path.exists():
        raise ConfigError(f"there is no file {path}")
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}, line {number} is not JSON: {error}") from error
        missing = [key for key in (prompt_key, answer_key) if not isinstance(record, dict) or key not in record]
        if missing:
            raise ConfigError(
                f"{path}, line {number} has no {' and no '.join(map(repr, missing))}: name the fields with "
                "task.prompt_key and task.answer_key"
            )
        questions.append(Question(query=str(record[prompt_key]), answer=str(record[answer_key])))
    return questions


TASKS = {
    "arithmetic": arithmetic,
    "python_sums": python_sums,
    "countdown": countdown,
    "jsonl": jsonl,
    "torchrl_env": torchrl_env,
}


def make_task(settings: Mapping[str, Any]) -> Task | EnvTask:
    """The task of a config node: ``name``, and arguments of the function of that name in this module.

    Raises:
        ConfigError: an unknown name or argument.

    Examples:
        >>> len(make_task({"name": "arithmetic", "largest": 2, "held_out": 1}).held_out)
        1
    """
    arguments = dict(settings)
    name = str(arguments.pop("name", None))
    if name not in TASKS:
        raise ConfigError(f"unknown task {name!r}.{nearest_name(name, list(TASKS))} There are {list(TASKS)}")
    make: Any = TASKS[name]
    known = inspect.signature(make).parameters
    for argument in arguments:
        if argument not in known:
            raise ConfigError(f"task {name!r} has no setting {argument!r}.{nearest_name(argument, list(known))}")
    for argument, parameter in known.items():
        if parameter.default is parameter.empty and argument not in arguments:
            raise ConfigError(f"task {name!r} needs {argument}: set task.{argument}=...")
    made: Task | EnvTask = make(**arguments)
    return made


def split(questions: Sequence[Question], held_out: int, seed: int) -> tuple[list[Question], list[Question]]:
    """Keep ``held_out`` questions apart, the same ones for the same seed; both parts in their old order.

    Raises:
        ConfigError: nothing would be left to train on.
    """
    require(held_out >= 0, f"held_out must be at least 0, got {held_out}")
    require(held_out < len(questions), f"held_out={held_out} of {len(questions)} questions leaves none to train on")
    order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(seed)).tolist()
    apart = set(order[:held_out])
    train = [question for index, question in enumerate(questions) if index not in apart]
    return train, [question for index, question in enumerate(questions) if index in apart]
