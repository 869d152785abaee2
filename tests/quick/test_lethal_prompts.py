"""A prompt that servers die on is found with few deaths and named; the other prompts get their answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict, lazy_stack
from torchrl.modules.llm.policies import Tokens

from tests.fake_sglang import FakeServer, FakeSettings, Fault
from torchrl_sglang import LethalPromptError, SamplingParams, ServerError, SGLangWrapper
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.errors import ServerLostError
from torchrl_sglang.pool import SGLangPool

LETHAL = 99
GREEDY = SamplingParams(max_new_tokens=4, temperature=0, ignore_eos=True)
PROMPTS = [[5, 6], [7], [8, LETHAL], [9], [10, 11], [12], [13], [14]]


@pytest.fixture
def make(tiny_llama: Path) -> Iterator[Callable[..., FakeServer]]:
    made: list[FakeServer] = []

    def start(**settings: Any) -> FakeServer:
        settings = {"lethal_id": LETHAL, "step_s": 0.0, **settings}
        made.append(FakeServer(FakeSettings(model_path=tiny_llama, **settings)).__enter__())
        return made[-1]

    yield start
    for server in made:
        server.__exit__(None, None, None)


def pool_of(*servers: FakeServer) -> SGLangPool:
    return SGLangPool([SGLangClient(server.url) for server in servers])


def sent(server: FakeServer) -> int:
    return sum(event["path"] == "/generate" for event in server.events)


@pytest.mark.parametrize("n", [1, 2])
def test_two_servers_die_and_the_others_answer_every_other_prompt(make: Callable[..., FakeServer], n: int) -> None:
    servers = [make() for _ in range(4)]
    pool = pool_of(*servers)
    params = GREEDY.updated(n=n)
    expected = pool_of(make(lethal_id=-1)).generate(PROMPTS, params)
    with pytest.raises(LethalPromptError, match="servers died on prompt numbers 2:") as lethal:
        pool.generate(PROMPTS, params)
    assert len(pool.healthy) == 2
    assert set(lethal.value.prompts) == {2}
    assert set(lethal.value.replies) == {0, 1, 3, 4, 5, 6, 7}
    for index, replies in lethal.value.replies.items():
        wanted = expected[index * n : (index + 1) * n]
        assert [reply.output_ids for reply in replies] == [reply.output_ids for reply in wanted]
    # The survivors still serve.
    assert len(pool.generate([[5, 6]], GREEDY)) == 1


def test_with_two_servers_the_prompt_is_named_although_none_is_left(make: Callable[..., FakeServer]) -> None:
    pool = pool_of(make(), make())
    with pytest.raises(ServerError, match="no server is left.*servers died on prompt numbers 2"):
        pool.generate(PROMPTS, GREEDY)


def test_a_single_server_gets_no_second_request(make: Callable[..., FakeServer]) -> None:
    server = make()
    with pytest.raises(ServerLostError):
        pool_of(server).generate(PROMPTS, GREEDY)
    assert sent(server) == 1


def test_a_server_that_dies_by_itself_costs_no_prompt(make: Callable[..., FakeServer]) -> None:
    dying = make(faults=(Fault(path="/generate", action="die", at="scheduled"),))
    pool = pool_of(dying, make(), make())
    prompts = [prompt for prompt in PROMPTS if LETHAL not in prompt]
    replies = pool.generate(prompts, GREEDY)
    assert [len(reply.output_ids) for reply in replies] == [4] * 7
    assert len(pool.healthy) == 2


def test_a_prompt_that_kills_only_at_full_length_is_found_too(make: Callable[..., FakeServer]) -> None:
    """The short requests pass, so the prompts are sent in halves, and one by one after the second death."""
    servers = [make(lethal_new_tokens=3) for _ in range(5)]
    pool = pool_of(*servers)
    prompts = [[20 + i] for i in range(20)]
    prompts[7].append(LETHAL)
    with pytest.raises(LethalPromptError, match="numbers 7:") as lethal:
        pool.generate(prompts, GREEDY)
    assert len(pool.healthy) == 2
    assert sorted(lethal.value.replies) == [i for i in range(20) if i != 7]


def test_the_policy_masks_the_row_and_returns_the_others(make: Callable[..., FakeServer]) -> None:
    rows = [TensorDict(tokens=Tokens(prompt=torch.tensor(prompt))) for prompt in PROMPTS]
    settings: dict[str, Any] = {"input_mode": "tokens", "generate_kwargs": {"max_new_tokens": 4, "ignore_eos": True}}

    class NoTokenizer:
        pad_token_id, eos_token_id = 0, 2

    masking = SGLangWrapper(pool_of(*(make() for _ in range(4))), on_error="mask", tokenizer=NoTokenizer(), **settings)
    generation = masking(lazy_stack(rows))["generation"]
    assert [bool(error) for error in generation.error] == [i == 2 for i in range(8)]
    assert generation.completion_tokens.tolist() == [0 if i == 2 else 4 for i in range(8)]
    assert generation.finish_reason[2] == "error"
    raising = SGLangWrapper(pool_of(*(make() for _ in range(4))), tokenizer=NoTokenizer(), **settings)
    with pytest.raises(LethalPromptError, match="numbers 2"):
        raising(lazy_stack(rows))
