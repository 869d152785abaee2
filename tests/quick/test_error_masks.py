"""``on_error="mask"`` masks what a prompt causes, and nothing else; a missing log-prob is an error, never certainty."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict, lazy_stack
from torchrl.modules.llm.policies import Tokens

from tests.fake_sglang import FakeServer, FakeSettings, Fault
from torchrl_sglang import RequestRejectedError, ServerError, SGLangWrapper
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import ClientConfig
from torchrl_sglang.errors import ProtocolError
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.generate import parse_one
from torchrl_sglang.protocol.messages import GenerateReply
from torchrl_sglang.testing.echo_pool import EchoPool

PROMPTS = [[i, i + 1] for i in range(10, 18)]


class NoTokenizer:
    pad_token_id, eos_token_id = 0, 2


@pytest.fixture
def make(tiny_llama: Path) -> Iterator[Callable[..., FakeServer]]:
    made: list[FakeServer] = []

    def start(**settings: Any) -> FakeServer:
        made.append(FakeServer(FakeSettings(model_path=tiny_llama, step_s=0.0, **settings)).__enter__())
        return made[-1]

    yield start
    for server in made:
        server.__exit__(None, None, None)


def policy(pool: Any, **settings: Any) -> SGLangWrapper:
    fixed = {"input_mode": "tokens", "on_error": "mask", "tokenizer": NoTokenizer()}
    if settings.get("generate", True):
        fixed["generate_kwargs"] = {"max_new_tokens": 4}
    return SGLangWrapper(pool, **{**fixed, **settings})


def batch(key: str = "prompt", prompts: list[list[int]] = PROMPTS) -> TensorDict:
    return lazy_stack([TensorDict(tokens=Tokens(**{key: torch.tensor(prompt)})) for prompt in prompts])


def sent(server: FakeServer) -> int:
    return sum(event["path"] == "/generate" for event in server.events)


@pytest.mark.parametrize("scoring", [False, True])
def test_a_wrong_key_is_raised_after_one_request(make: Callable[..., FakeServer], scoring: bool) -> None:
    server = make(api_key="right")
    connected = SGLangPool([SGLangClient(server.url, ClientConfig(api_key="right"))])
    connected.connect()
    connected.clients[0].config = replace(connected.clients[0].config, api_key="wrong")  # it was changed meanwhile
    with pytest.raises(RequestRejectedError) as refused:
        policy(connected, generate=not scoring)(batch("full" if scoring else "prompt"))
    assert refused.value.status == 401
    assert sent(server) <= 1


@pytest.mark.parametrize("status", [404, 429, 500, 503])
def test_a_failure_of_the_server_is_raised(make: Callable[..., FakeServer], status: int) -> None:
    server = make()
    server.arm(Fault(path="/generate", action="refuse", status=status, times=0))
    with pytest.raises(RequestRejectedError) as refused:
        policy(SGLangPool([SGLangClient(server.url)]))(batch())
    assert refused.value.status == status
    assert sent(server) == 1


def test_settings_that_the_server_rejects_are_no_prompts_fault(make: Callable[..., FakeServer]) -> None:
    server = make()
    server.arm(Fault(path="/generate", action="refuse", status=400, message="no grammar", times=0))
    with pytest.raises(RequestRejectedError, match="no grammar"):
        policy(SGLangPool([SGLangClient(server.url)]))(batch())
    assert sent(server) == 2  # the batch, and the shortest prompt


def test_half_a_reply_and_a_dead_server_are_raised(make: Callable[..., FakeServer]) -> None:
    server = make()
    pool = SGLangPool([SGLangClient(server.url, ClientConfig(connect_retries=0))])
    pool.connect()
    server.arm(Fault(path="/generate", action="half_reply"))
    with pytest.raises((ProtocolError, ServerError)):
        policy(pool)(batch())
    server.stop()
    with pytest.raises(ServerError):
        policy(pool)(batch())


# ------------------------------------------------------------------------------------------- missing log-probs


def reply_with(**meta: Any) -> dict[str, Any]:
    fixed = {"finish_reason": {"type": "length"}, "input_token_logprobs": [[None, 5, None], [-0.5, 6, None]]}
    return {"output_ids": [7, 8], "text": "", "meta_info": {**fixed, **meta}}


def test_null_is_nan_except_at_the_first_token_of_the_prompt() -> None:
    answer = reply_with(output_token_logprobs=[[None, 7, None], [-0.25, 8, None]])
    answer["meta_info"]["input_token_logprobs"].append([None, 9, None])
    reply = parse_one(answer, server="http://host", prompt_logprobs=True)
    assert math.isnan(reply.output_logprobs[0])
    assert reply.output_logprobs[1] == -0.25
    assert reply.prompt_logprobs[:2] == [None, -0.5]
    assert math.isnan(reply.prompt_logprobs[2])


def test_null_among_the_log_probs_within_the_truncated_distribution_is_nan() -> None:
    answer = reply_with(
        output_token_logprobs=[[-0.5, 7, None], [-0.25, 8, None]],
        output_token_sampling_mask=[[7], [8]],
        output_token_sampling_logprobs=[None, -0.1],
    )
    reply = parse_one(answer, server="http://host")
    assert math.isnan(reply.support_logprobs[0])


class Unmeasured(EchoPool):
    """Computes NaN where a prompt holds one of ``bad``: in the response, or in the prompt itself."""

    bad: frozenset[int] = frozenset({13})
    where = "output_logprobs"

    def _answer(self, ids_T: Any, *args: Any, **kwargs: Any) -> GenerateReply:
        reply = super()._answer(ids_T, *args, **kwargs)
        values = getattr(reply, self.where)
        if not self.bad & set(ids_T) or not values:
            return reply
        return replace(reply, **{self.where: [*values[:-1], math.nan]})


def test_a_row_without_log_probs_is_an_error_or_masked() -> None:
    with pytest.raises(ServerError, match="batch index 2: .* no finite log-prob for token 3 of the response"):
        policy(Unmeasured(), on_error="raise")(batch())
    out = policy(Unmeasured())(batch())
    generation = out["generation"]
    assert [bool(error) for error in generation.error] == [13 in prompt for prompt in PROMPTS]
    rows = out.get(("log_probs", "response"), as_list=True)
    assert all(row.isfinite().all() for row in rows)
    assert [len(row) for row in rows] == [0 if 13 in prompt else 4 for prompt in PROMPTS]


def test_a_scored_row_without_log_probs_is_an_error_or_masked() -> None:
    pool = Unmeasured()
    pool.where = "prompt_logprobs"
    with pytest.raises(ServerError, match="batch index 2: .* token 1 of the prompt"):
        policy(pool, generate=False, on_error="raise")(batch("full"))
    out = policy(pool, generate=False)(batch("full"))
    attended = out.get(("masks", "all_attention_mask"), as_list=True)
    assert [bool(row.all()) for row in attended] == [13 not in prompt for prompt in PROMPTS]


def test_log_probs_that_are_missing_everywhere_are_no_prompts_fault() -> None:
    pool = Unmeasured()
    pool.bad = frozenset(range(320))
    with pytest.raises(ServerError, match="Do the weights hold NaN"):
        policy(pool)(batch())
