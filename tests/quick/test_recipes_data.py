"""Question streams that start anywhere, tasks, rewards in an environment, and background rollouts."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torchrl.collectors import Collector
from transformers import AutoTokenizer

from torchrl_sglang import ConfigError, ServerError, ServerTimeoutError, SGLangWrapper, recipes
from torchrl_sglang.recipes.data.rewards import score_exact, score_number, score_sum
from torchrl_sglang.testing.echo_pool import EchoPool

QUESTIONS = [recipes.Question(query=f"q{i}", answer=str(i)) for i in range(7)]


def queries(stream: recipes.QuestionStream, count: int) -> list[str]:
    return [item["query"] for item in itertools.islice(stream, count)]


def test_a_stream_with_a_later_start_continues_with_the_same_questions() -> None:
    whole = queries(recipes.QuestionStream(QUESTIONS, seed=3), 30)
    for start in (0, 5, 7, 20):
        assert queries(recipes.QuestionStream(QUESTIONS, seed=3, start=start), 30 - start) == whole[start:]
    for pass_number in range(4):
        assert len(set(whole[7 * pass_number : 7 * pass_number + 7])) == 7
    assert whole[:7] != whole[7:14]
    assert queries(recipes.QuestionStream(QUESTIONS, seed=4), 30) != whole


def test_held_out_questions_are_not_in_the_training_set(tmp_path: Path) -> None:
    lines = [f'{{"question": "What is {i}?", "answer": "#### {i}"}}' for i in range(20)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n\n")
    settings = {"name": "jsonl", "path": str(tmp_path / "data.jsonl"), "prompt_key": "question", "held_out": 5}
    for task in (
        recipes.make_task({"name": "arithmetic"}),
        recipes.make_task({"name": "countdown", "questions": 40, "held_out": 8}),
        recipes.make_task(settings),
    ):
        assert task.held_out
        assert not {one.query for one in task.train} & {one.query for one in task.held_out}
    assert len(recipes.make_task(settings).train) == 15


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"name": "arithmetc"}, "Did you mean 'arithmetic'"),
        ({"name": "arithmetic", "larges": 3}, "no setting 'larges'. Did you mean 'largest'"),
        ({"name": "arithmetic", "largest": 2, "held_out": 4}, "leaves none to train on"),
        ({"name": "jsonl"}, "needs path"),
        ({"name": "jsonl", "path": "/nowhere.jsonl"}, "no file /nowhere.jsonl"),
        ({"name": "jsonl", "path": "bad.jsonl"}, "line 2 is not JSON"),
        ({"name": "jsonl", "path": "other.jsonl"}, "line 1 has no 'answer'"),
        ({"name": "jsonl", "path": "bad.jsonl", "score": "numbr"}, "Did you mean 'number'"),
    ],
)
def test_an_invalid_task_is_refused_with_the_reason(
    settings: dict[str, Any], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "answer": "b"}\nnothing\n')
    (tmp_path / "other.jsonl").write_text('{"prompt": "a"}\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=complaint):
        recipes.make_task(settings)


def test_countdown_is_scored_by_torchrls_rules() -> None:
    task = recipes.make_task({"name": "countdown", "questions": 10, "held_out": 2})
    for question in task.train:
        assert question.answer.startswith("target=")
        assert task.score("no tags", question.answer, True) == (0.0, False)
        assert task.score("<answer>1+</answer>", question.answer, True) == (0.1, False)


@pytest.mark.parametrize(
    ("score", "answer", "truth", "expected"),
    [
        (score_sum, "7", "7", (1.0, True)),
        (score_sum, "17", "7", (0.3, False)),
        (score_sum, "", "7", (0.0, False)),
        (score_number, "The total is $1,234.50.", "1234.5", (1.0, True)),
        (score_number, "-3", "#### -3", (1.0, True)),
        (score_number, "none", "3", (0.0, False)),
        (score_exact, "Not paris", "Paris", (0.0, False)),
    ],
)
def test_scores(score: Any, answer: str, truth: str, expected: tuple[float, bool]) -> None:
    reward, right = score(answer, truth, True)
    assert (reward, right) == (pytest.approx(expected[0]), expected[1])


@pytest.fixture(scope="module")
def policy(tiny_llama: Path) -> SGLangWrapper:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    return SGLangWrapper(EchoPool(), tokenizer=tokenizer, input_mode="history", generate_kwargs={"max_new_tokens": 4})


def test_an_environment_asks_groups_of_questions_from_its_start_position_without_gaps(policy: SGLangWrapper) -> None:
    task = recipes.make_task({"name": "arithmetic"})
    env = recipes.make_env(task, policy.tokenizer, questions=3, answers=2, seed=0, start=11)
    collector = Collector(env, policy, frames_per_batch=6, total_frames=18, auto_register_policy_transforms=False)
    batches = [recipes.Sequences.from_tensordict(batch) for batch in collector]
    assert torch.cat([batch.position_B for batch in batches]).tolist() == [n for n in range(11, 20) for _ in range(2)]
    assert all(batch.num_tokens == sum(batch.lengths_B) for batch in batches)
    query = recipes.QuestionStream(task.train, seed=0).at(11).query
    assert query in policy.tokenizer.decode(batches[0].prompt_B_T[0])
    collector.shutdown()


def test_an_evaluation_asks_the_same_held_out_questions_each_time(policy: SGLangWrapper) -> None:
    def score(answer: str, truth: str, in_time: bool) -> tuple[float, bool]:
        seen.append(truth)
        return 1.0, len(seen) % 4 == 1  # the first of every four answers

    seen: list[str] = []
    task = recipes.Task(train=QUESTIONS[:4], held_out=QUESTIONS[4:], score=score)
    env = recipes.make_test_env(task, policy.tokenizer, questions=10, answers=4)
    for _ in range(2):
        found = recipes.evaluate(env, policy, answers=4, ks=[1, 2, 4])
        assert found["eval_pass_at_1"] == pytest.approx(0.25)
        assert found["eval_pass_at_2"] == pytest.approx(0.5)
        assert found["eval_pass_at_4"] == 1.0
        assert found["eval_truncated"] == 1.0
    assert seen == [truth for truth in ("4", "5", "6") for _ in range(4)] * 2


def test_a_torchrl_environment_is_a_task_and_can_start_later(policy: SGLangWrapper) -> None:
    settings = {"num_count": 3, "max_number": 9}
    task = recipes.make_task(
        {"name": "torchrl_env", "env": "CountdownEnv", "settings": settings, "held_out": {"seed": 99}}
    )

    def batches(start: int, count: int) -> list[recipes.Sequences]:
        env = recipes.make_env(task, policy.tokenizer, questions=2, answers=3, seed=5, start=start)
        collector = Collector(
            env, policy, frames_per_batch=6, total_frames=6 * count, auto_register_policy_transforms=False
        )
        found = [recipes.Sequences.from_tensordict(batch) for batch in collector]
        collector.shutdown()
        return found

    whole, later = batches(0, 3), batches(2, 2)
    for one, other in zip(whole[1:], later, strict=True):
        assert [ids.tolist() for ids in one.prompt_B_T] == [ids.tolist() for ids in other.prompt_B_T]
    prompts = [ids.tolist() for ids in whole[0].prompt_B_T]
    assert prompts[0] == prompts[1] == prompts[2] != prompts[3] == prompts[5]
    assert whole[0].reward_B.tolist() == [0.0] * 6
    assert whole[0].next_position(0, 2) == 2

    test_env = recipes.make_test_env(task, policy.tokenizer, questions=2, answers=3)
    assert recipes.evaluate(test_env, policy, answers=3, ks=[1, 3])["eval_pass_at_3"] == 0.0
    with pytest.raises(ConfigError, match="task.held_out must say"):
        unset = recipes.make_task({"name": "torchrl_env", "env": "CountdownEnv"})
        recipes.make_test_env(unset, policy.tokenizer, questions=2, answers=3)
    with pytest.raises(ConfigError, match="Did you mean 'GSM8KEnv'"):
        recipes.make_task({"name": "torchrl_env", "env": "GSM8Env"})


# ---------------------------------------------------------------------------------------- background rollouts


class Batches:
    """Yields a number when allowed; counts the batches that were started."""

    def __init__(self) -> None:
        self.started = 0
        self.may_end = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)

    def __iter__(self) -> Any:
        while True:
            self.started += 1
            self.begun.release()
            assert self.may_end.acquire(timeout=30)
            yield self.started


def test_no_batch_is_collected_further_ahead_than_allowed() -> None:
    batches = Batches()
    with recipes.BackgroundRollouts(batches, ahead=2, timeout_s=30) as rollouts:
        for _ in range(10):
            batches.may_end.release()
        assert rollouts.take() == 1
        for expected in (1, 2, 3):  # one taken, two ahead
            assert batches.begun.acquire(timeout=30), expected
        assert not batches.begun.acquire(timeout=0.2)
        assert rollouts.take() == 2
        assert batches.begun.acquire(timeout=30)


def test_ahead_0_collects_only_while_the_trainer_waits() -> None:
    batches = Batches()
    with recipes.BackgroundRollouts(batches, ahead=0, timeout_s=30) as rollouts:
        for expected in (1, 2, 3):
            assert not batches.begun.acquire(timeout=0.1)
            batches.may_end.release()
            assert rollouts.take() == expected
            assert batches.begun.acquire(timeout=30)


def test_take_raises_the_error_that_ended_the_thread() -> None:
    def failing() -> Any:
        yield 1
        raise ServerError("the server is gone")

    with recipes.BackgroundRollouts(failing(), ahead=1, timeout_s=30) as rollouts:
        assert rollouts.take() == 1
        with pytest.raises(ServerError, match="gone"):
            rollouts.take()


def test_take_times_out_and_raises_stop_iteration_at_the_end() -> None:
    batches = Batches()
    rollouts = recipes.BackgroundRollouts(batches, ahead=1, timeout_s=0.2)
    with pytest.raises(ServerTimeoutError, match="no rollouts"):
        rollouts.take()
    batches.may_end.release()
    rollouts.close()
    with recipes.BackgroundRollouts([1], ahead=1) as short:
        assert short.take() == 1
        with pytest.raises(StopIteration):
            short.take()
