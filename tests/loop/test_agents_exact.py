"""What agents' sessions record on a real server: log-probs, weight versions, the prefix cache, forced tool calls."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.agent_kit import ACTIONS, Agent, chat, check_parents, run, told_tokens, user
from tests.loop.sync_cases import load
from torchrl_sglang import SyncConfig, WeightSync
from torchrl_sglang.agents.served_model import ServedModel
from torchrl_sglang.agents.sessions import Sessions
from torchrl_sglang.agents.settings import SessionSettings
from torchrl_sglang.agents.types import ChatRequest, Trajectory
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.messages import HttpRequest
from torchrl_sglang.server import SGLangServer

ATOL = 1e-4
TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"enum": [1, 2]}},
                "required": ["a", "b"],
            },
        },
    },
)


@contextmanager
def serving(pool: SGLangPool, **settings: Any) -> Iterator[Sessions]:
    sessions = Sessions(ServedModel(pool, settings=SessionSettings(**settings)))
    try:
        yield sessions
    finally:
        run(sessions.close())


def log_probs(model: Any, token_ids: tuple[int, ...]) -> torch.Tensor:
    """The log-prob of every token but the first, given those before it."""
    ids = torch.tensor([token_ids])
    with torch.no_grad():
        scores = model(ids).logits.log_softmax(-1)
    return scores[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]


def check_log_probs(trajectory: Trajectory, *models: Any) -> None:
    """Every sampled token's log-prob is that of the model of its version."""
    recorded = torch.tensor(trajectory.log_probs[1:])
    mask = torch.tensor(trajectory.loss_mask[1:]).bool()
    versions = torch.tensor(trajectory.weight_versions[1:])
    assert mask.any()
    assert (versions >= 0).equal(mask)
    for version, model in enumerate(models):
        of_version = versions == version
        gap = (log_probs(model, trajectory.token_ids) - recorded)[of_version].abs()
        assert not len(gap) or gap.max() < ATOL


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=ACTIONS, seed=st.integers(0, 2**32))
def test_log_probs_of_generated_conversations_are_those_of_their_tokens(
    pool: SGLangPool, model: Any, actions: list[str], seed: int
) -> None:
    with serving(pool) as sessions:
        session = sessions.create()
        agent = Agent(session, random.Random(seed), [], max_new_tokens=8)
        for action in actions:
            agent.act(action)
        for trajectory in session.trajectories():
            check_log_probs(trajectory, model)
        check_parents(session.trajectories(), session.info().sampled_tokens)


def test_the_second_turn_finds_the_first_in_the_prefix_cache(pool: SGLangPool) -> None:
    with serving(pool) as sessions:
        session = sessions.create()
        first = chat(session, [user("What is the capital of France?")], sampling={"max_new_tokens": 20})
        again = [user("What is the capital of France?"), first.choices[0].message, user("And of Spain?")]
        second = chat(session, again, sampling={"max_new_tokens": 4})
        assert second.cached_tokens >= first.prompt_tokens + first.completion_tokens - 1
        assert len(session.trajectories()) == 1


@pytest.mark.parametrize("mode", ["retract", "abort"])
def test_an_update_in_a_turn_splits_its_versions_and_each_part_agrees_with_its_model(
    pristine_server: SGLangServer, tiny_llama: Path, tiny_llama_b: Path, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_prepared, goes_on = threading.Event(), threading.Event()
    send = SGLangClient.send

    def send_later(client: SGLangClient, request: HttpRequest, **options: Any) -> Any:
        if request.path == "/pause_generation":  # all that is computed before it may take longer than the turn
            is_prepared.set()
            goes_on.wait(60)
        return send(client, request, **options)

    monkeypatch.setattr(SGLangClient, "send", send_later)
    models = load(tiny_llama), load(tiny_llama_b)
    with closing(SGLangPool([SGLangClient(pristine_server.url)])) as pool, serving(pool) as sessions:
        session = sessions.create()
        seen: list[Any] = []
        sync = WeightSync(pool, SyncConfig(pause=mode, bucket_bytes=60_000))

        async def story() -> None:
            sampling = {"max_new_tokens": 300, "ignore_eos": True}
            first = await session.chat(ChatRequest(messages=(user("dog"),), sampling={"max_new_tokens": 8}))
            talk = (user("dog"), first.choices[0].message, user("fox"))
            update = asyncio.ensure_future(asyncio.to_thread(sync.push, models[1]))
            await asyncio.to_thread(is_prepared.wait, 60)
            quiet = asyncio.ensure_future(session.chat(ChatRequest(messages=(user("cat"),), sampling=sampling)))
            turn = asyncio.ensure_future(session.chat(ChatRequest(messages=talk, sampling=sampling), seen.append))
            while len(told_tokens(seen)) < 20:
                await asyncio.sleep(0.001)
            goes_on.set()
            with closing(sync):
                await update
            await asyncio.gather(turn, quiet)

        run(story())
        trajectories = session.trajectories()
        assert len(trajectories) == 2
        for trajectory in trajectories:
            check_log_probs(trajectory, *models)
            sampled = [version for version in trajectory.weight_versions if version >= 0]
            assert sampled == sorted(sampled)
            assert set(sampled) == {0, 1}
        later = chat(session, [user("later")], sampling={"max_new_tokens": 4})
        assert set(later.choices[0].weight_versions) == {1}


@pytest.mark.slow
def test_a_call_that_is_forced_is_made_and_its_conversation_goes_on(
    special_server: Callable[..., SGLangServer], model: Any
) -> None:
    server = special_server(extra_args=("--grammar-backend", "xgrammar"))
    with closing(SGLangPool([SGLangClient(server.url)])) as pool, serving(pool) as sessions:
        session = sessions.create()
        talk: list[Any] = [user("What is 2 + 3?")]
        options: dict[str, Any] = {"tools": TOOLS, "sampling": {"max_new_tokens": 200}, "parallel_tool_calls": False}
        for choice in ("required", {"type": "function", "function": {"name": "add"}}):
            turn = chat(session, talk, tool_choice=choice, **options)
            assert turn.choices[0].finish_reason == "tool_calls"
            (call,) = turn.choices[0].message["tool_calls"]
            arguments = json.loads(call["function"]["arguments"])
            assert call["function"]["name"] == "add"
            assert set(arguments) == {"a", "b"}
            assert arguments["b"] in (1, 2)
            talk += [turn.choices[0].message, {"role": "tool", "tool_call_id": call["id"], "content": "5"}]
        final = chat(session, talk, tools=TOOLS, sampling={"max_new_tokens": 5})
        assert final.choices[0].token_ids
        (trajectory,) = session.trajectories()
        assert sum(trajectory.loss_mask) == session.info().sampled_tokens


@pytest.mark.slow
@pytest.mark.parametrize("first", ["<", "{"])
def test_a_schema_beside_tools_allows_calls_and_json_and_nothing_else(
    special_server: Callable[..., SGLangServer], tokenizer: Any, first: str
) -> None:
    server = special_server(extra_args=("--grammar-backend", "xgrammar"))
    schema = {"type": "object", "properties": {"c": {"enum": [1, 2]}}, "required": ["c"]}
    (wanted,) = tokenizer(first, add_special_tokens=False)["input_ids"]
    blanks = [token for token in range(len(tokenizer)) if not tokenizer.decode([token]).strip()]
    bias = {**dict.fromkeys(blanks, -1000.0), wanted: 1000.0}  # JSON may have white space without end
    with closing(SGLangPool([SGLangClient(server.url)])) as pool, serving(pool) as sessions:
        sampling = {"max_new_tokens": 300, "json_schema": schema, "logit_bias": bias}
        turn = chat(sessions.create(), [user("?")], tools=TOOLS, sampling=sampling, parallel_tool_calls=False)
        message = turn.choices[0].message
        calls = message.get("tool_calls") or ()
        assert [call["function"]["name"] for call in calls] == (["add"] if first == "<" else [])
        said = json.loads(calls[0]["function"]["arguments"] if calls else message["content"])
        assert said["b" if calls else "c"] in (1, 2)
