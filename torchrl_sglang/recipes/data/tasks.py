"""Tasks: training questions, held-out questions and a scoring function, selected by ``task.name``."""

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
from torchrl_sglang.config.checking import require, require_number
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.recipes.data.questions import Question
from torchrl_sglang.recipes.data.rewards import Scorer, score_countdown, score_exact, score_number, score_sum
from torchrl_sglang.recipes.data.torchrl_env import EnvTask, torchrl_env

__all__ = ["Task", "arithmetic", "countdown", "jsonl", "make_task", "python_sums", "read_jsonl"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Questions and their scoring function.

    Attributes:
        train: questions to train on.
        held_out: questions for evaluations; none of them is in ``train``.
        score: the scoring function.
        system_prompt: system message before every question; ``""`` is an empty one, which also keeps a chat template
            from inserting its default.
    """

    train: Sequence[Question]
    held_out: Sequence[Question]
    score: Scorer
    system_prompt: str | None = ""


def arithmetic(*, largest: int = 9, held_out: int = 16, seed: int = 0) -> Task:
    """Sums of two numbers from 1 to ``largest``; see :func:`score_sum` for the reward.

    Args:
        largest: the largest number.
        held_out: how many of the ``largest ** 2`` sums are held out.
        seed: seed of the choice of held-out sums.

    Examples:
        >>> task = arithmetic(largest=3, held_out=2)
        >>> len(task.train), task.train[0].query, task.train[0].answer
        (7, 'What is 1 + 2? Answer with only the number.', '3')
    """
    require_number("largest", largest, whole=True, at_least=1)
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
    """Sums for a model that may run Python (``grpo_tools.py``); a small model rarely gets them right without it.

    Args:
        smallest: the smallest number.
        largest: the largest number.
        questions: number of training questions.
        held_out: number of held-out questions.
        seed: seed of the draw.

    Examples:
        >>> task = python_sums(questions=2, held_out=1)
        >>> len(task.train), task.train[0].query
        (2, 'Write a Python code block that prints 633 + 160.')
    """
    for name, value in (("smallest", smallest), ("largest", largest), ("questions", questions)):
        require_number(name, value, whole=True, at_least=1)
    _check_draw(held_out, seed)
    require(smallest < largest, f"smallest must be at least 1 and below largest, got {smallest} and {largest}")
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
    """TorchRL's Countdown: write an expression that reaches a target and uses each given number at most once.

    Args:
        numbers: how many numbers a question gives.
        largest: the largest of them.
        largest_target: the largest target.
        questions: number of training questions.
        held_out: number of held-out questions.
        seed: seed of the draw.
    """
    for name, value in (("numbers", numbers), ("largest", largest), ("questions", questions)):
        require_number(name, value, whole=True, at_least=1)
    require_number("largest_target", largest_target, whole=True, at_least=1)
    _check_draw(held_out, seed)
    env = CountdownEnv(
        num_count=numbers,
        max_number=largest,
        max_target=largest_target,
        seed=seed,
        num_envs=questions + held_out,
        compute_reward=False,
    )
    drawn = env.reset()
    pairs = dict(zip(list(drawn["query"]), list(drawn["answer"]), strict=True))  # drops duplicates
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
    """Questions from a file with one JSON object per line, e.g. GSM8K's files with ``prompt_key=question``.

    Args:
        path: the file.
        prompt_key: name of the field with the question.
        answer_key: name of the field with the reference answer.
        score: ``number``, ``exact`` or ``sum``: see :mod:`torchrl_sglang.recipes.data.rewards`.
        held_out: number of lines to hold out; not used with ``held_out_path``.
        held_out_path: a separate file with the held-out questions.
        system_prompt: system message before every question.
        seed: seed of the choice of held-out lines.

    Raises:
        ConfigError: the file does not exist, a line is invalid (the message has its number), or ``score`` is unknown.
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
    """Read the questions of a JSONL file; empty lines are skipped.

    Raises:
        ConfigError: the file does not exist, or a line is not a JSON object with both keys.
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
    """Make the task of a config node: ``name`` selects a function of this module, the other keys are its arguments.

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
    """Split questions into a training and a held-out part, determined by the seed; both keep the given order.

    Raises:
        ConfigError: no training question would be left.
    """
    _check_draw(held_out, seed)
    require(held_out < len(questions), f"held_out={held_out} of {len(questions)} questions leaves none to train on")
    order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(seed)).tolist()
    apart = set(order[:held_out])
    train = [question for index, question in enumerate(questions) if index not in apart]
    return train, [question for index, question in enumerate(questions) if index in apart]


def _check_draw(held_out: int, seed: int) -> None:
    require_number("held_out", held_out, whole=True, at_least=0)
    require_number("seed", seed, whole=True, at_least=0, below=2**63)
