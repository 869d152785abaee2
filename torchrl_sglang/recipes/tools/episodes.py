"""Environments of conversations in which the assistant may run Python and reads the program's output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from tensordict import TensorDictBase, lazy_stack
from torchrl.data.llm import History
from torchrl.envs import TransformedEnv

from torchrl_sglang.config.checking import require, require_number
from torchrl_sglang.recipes.data.environment import chat_env
from torchrl_sglang.recipes.data.evaluation import mean_pass_at_k
from torchrl_sglang.recipes.data.questions import QuestionStream
from torchrl_sglang.recipes.data.rewards import RewardTransform, Scorer
from torchrl_sglang.recipes.data.tasks import Task
from torchrl_sglang.recipes.tools.python_tool import PROGRAM, find_program, run_python

__all__ = ["PythonTool", "evaluate_with_tool", "make_tool_env"]

_PROGRAMS_AT_ONCE = 8


class PythonTool(RewardTransform):
    """Runs the program in an answer and appends its output; scores an answer without a program and ends the episode.

    It replaces TorchRL's ``PythonInterpreter``, which runs programs one after the other and without limits, shows
    tracebacks with names of temporary files, and adds empty messages to conversations without a program if another
    conversation of the batch has one.

    Args:
        score: scores the last answer, the one without a program.
        max_turns: maximum number of answers per conversation; the last one is scored even if it has a program.
        reply: the tool's message; ``{output}`` is replaced by the program's output.
        bonus: the share of the reward, from 0 to below 1, that a conversation earns if its first program prints the
            reference answer. It rewards a useful program before the model has learned to report the output.
        timeout_s: seconds that a program may run.
        program: regular expression that finds a program in an answer, see :func:`find_program`.
        answer_key: key of the reference answer.
        unsafe: run programs as root also where they can't be isolated, see :func:`run_python`.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        score: Scorer,
        *,
        max_turns: int = 2,
        reply: str = "{output}",
        bonus: float = 0.0,
        timeout_s: float = 5.0,
        program: str = PROGRAM,
        answer_key: str = "answer",
        unsafe: bool = False,
    ) -> None:
        require_number("max_turns", max_turns, whole=True, at_least=1)
        require_number("timeout_s", timeout_s, above=0)
        require("{output}" in reply, f"reply must contain {{output}}, got {reply!r}")
        require_number("bonus", bonus, at_least=0, below=1)
        super().__init__(score, answer_key=answer_key)
        self.max_turns, self.reply, self.bonus = max_turns, reply, bonus
        self.timeout_s, self.program, self.unsafe = timeout_s, program, unsafe

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        conversations_B = list(next_tensordict["history"].prompt.unbind(0))
        truths_B = [str(truth) for truth in tensordict[self.answer_key]]
        ended_B = (~tensordict["generation"].truncated).tolist()
        with ThreadPoolExecutor(_PROGRAMS_AT_ONCE) as threads:
            outputs_B = list(threads.map(self._run, conversations_B))
        rewards_B, right_B = [], []
        for i, (conversation, output, truth) in enumerate(zip(conversations_B, outputs_B, truths_B, strict=True)):
            if output is None:
                reward, right = self.score(str(conversation[-1].content), truth, ended_B[i])
                reward *= 1 - self.bonus
            else:
                found = num_answers(conversation) == 1 and self.score(output, truth, True)[1]
                reward, right = self.bonus * found, False
                message = History(role="tool", content=self.reply.format(output=output))
                conversations_B[i] = conversation.append(message, inplace=False)
            rewards_B.append(float(reward))
            right_B.append(right)
        next_tensordict["history"].prompt = lazy_stack(conversations_B)
        return self._write(next_tensordict, rewards_B, right_B, done_B=[output is None for output in outputs_B])

    def _run(self, conversation: History) -> str | None:
        """Output of the last answer's program; ``None`` if it has no program or is the last allowed answer."""
        program = find_program(str(conversation[-1].content), self.program)
        if program is None or num_answers(conversation) >= self.max_turns:
            return None
        return run_python(program, timeout_s=self.timeout_s, unsafe=self.unsafe).output


def num_answers(conversation: History) -> int:
    """Number of assistant messages."""
    return sum(role == "assistant" for role in conversation.role)


def make_tool_env(
    task: Task, tokenizer: Any, tool: PythonTool, *, questions: int, answers: int, seed: int | None, start: int = 0
) -> TransformedEnv:
    """Make a ``ChatEnv`` whose conversations have a tool; a slot asks its next question when its conversation ends.

    Args:
        task: the questions; ``tool`` has the scoring function.
        tokenizer: has the chat template.
        tool: runs programs and scores answers.
        questions: number of questions asked at the same time.
        answers: number of conversations per question.
        seed: seed of the order of questions; ``None`` asks the held-out questions in order.
        start: number of the first question.
    """
    stream = QuestionStream(task.held_out if seed is None else task.train, seed=seed, start=start)
    return chat_env(stream.loader(1), tool, task, tokenizer, questions=questions, answers=answers)


def evaluate_with_tool(
    env: TransformedEnv,
    policy: Callable[[TensorDictBase], TensorDictBase],
    *,
    max_turns: int,
    answers: int,
    ks: Sequence[int],
) -> dict[str, float]:
    """Evaluate each slot's first conversation.

    Args:
        env: from :func:`make_tool_env` with ``seed=None``; a new one for each evaluation.
        policy: generates the answers.
        max_turns: the tool's ``max_turns``.
        answers: number of conversations per question.
        ks: the values of k for pass@k.

    Returns:
        ``eval_reward_mean``, ``eval_pass_at_<k>`` for every k, and ``eval_program_rate``, the fraction of conversations
        in which a program ran.
    """
    size = env.batch_size.numel()
    reward_B, right_B, used_B = torch.zeros(size), torch.zeros(size, dtype=torch.bool), torch.zeros(size)
    open_B = torch.ones(size, dtype=torch.bool)
    state = env.reset()
    for _ in range(max_turns):
        step, state = env.step_and_maybe_reset(policy(state))
        done_B = step["next", "done"].reshape(size)
        reward_B += open_B * step["next", "reward"].reshape(size)
        right_B |= open_B & step["next", "right"].reshape(size)
        used_B[open_B & ~done_B] = 1
        open_B &= ~done_B
        if not open_B.any():
            break
    return {
        "eval_reward_mean": float(reward_B.mean()),
        **mean_pass_at_k(right_B.reshape(-1, answers), ks),
        "eval_program_rate": float(used_B.mean()),
    }
