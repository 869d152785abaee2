"""Nothing that this package sends ends a server: random settings, ids, schemas, biases and texts on one real server.

Each request is answered, or refused with an error that says who refuses it: this package before sending, or the server
with a status. At the end the server's processes are those of the beginning. The examples are the same in every run.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tensordict import TensorDict, lazy_stack
from torchrl.modules.llm.policies import Text, Tokens

from torchrl_sglang import ConfigError, RequestRejectedError, SamplingParams, SGLangChat, SGLangWrapper
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.server import SGLangServer

VOCABULARY = 320
REPEATABLE = settings(
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],  # a failing example is not shrunk: it may have ended the server
    suppress_health_check=list(HealthCheck),
)

ODD_NUMBERS = (-1, 0, 1.5, math.nan, math.inf, -math.inf, 1e-7, 1e-300, 1e300, 10**400, 2**31, 2**63, 2**70)
ODD_OBJECTS = (
    None,
    True,
    "1",
    "",
    [],
    {},
    b"x",
    "\0",
    "\ud800",
    np.float32(0.5),
    np.int64(3),
    torch.tensor(2),
    object(),
)
BAD_IDS = (VOCABULARY, 10**7, -1, 2**31, 2**63)

odd = st.sampled_from((*ODD_NUMBERS, *ODD_OBJECTS))
good_ids = st.integers(0, VOCABULARY - 1)
any_ids = st.one_of(*[good_ids] * 19, st.sampled_from(BAD_IDS))
texts = st.text(max_size=12)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 3), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)
schemas = st.one_of(
    st.sampled_from([{"type": "integer"}, {"type": "object"}, {"enum": ["a"]}, True, False, "$$ANY$$", {"$ref": "#"}]),
    st.builds(lambda kind, extra: {"type": kind, **extra}, st.sampled_from(["string", "array", "x"]),
              st.dictionaries(st.sampled_from(["items", "pattern", "enum", "minLength", "maxItems"]), json_values)),
    json_values,
)  # fmt: skip
patterns = st.one_of(st.sampled_from(["[0-9]+", "a*", "(", "(?=a)", "a{3,5}", "\\w+\\s", "[^\\s\\S]", "\\x00"]), texts)


def mostly(good: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(*[good] * 9, odd)


SETTINGS: dict[str, st.SearchStrategy[Any]] = {
    "max_new_tokens": mostly(st.integers(0, 6)),
    "min_new_tokens": mostly(st.integers(0, 4)),
    "temperature": mostly(st.floats(0, 4)),
    "top_p": mostly(st.floats(0, 1)),
    "top_k": mostly(st.integers(-1, 400)),
    "min_p": mostly(st.floats(0, 1)),
    "frequency_penalty": mostly(st.floats(-2, 2)),
    "presence_penalty": mostly(st.floats(-2, 2)),
    "repetition_penalty": mostly(st.floats(0, 2)),
    "stop": st.one_of(texts, st.lists(texts, max_size=3), odd),
    "stop_token_ids": st.one_of(st.lists(any_ids, max_size=4), any_ids, odd),
    "eos_token_id": st.one_of(st.lists(any_ids, max_size=4), any_ids, odd),
    "stop_regex": st.one_of(patterns, st.lists(patterns, max_size=2), odd),
    "ignore_eos": mostly(st.booleans()),
    "skip_special_tokens": mostly(st.booleans()),
    "spaces_between_special_tokens": mostly(st.booleans()),
    "no_stop_trim": mostly(st.booleans()),
    "logit_bias": st.one_of(
        st.dictionaries(st.one_of(any_ids, any_ids.map(str), texts), mostly(st.floats(-9, 9)), max_size=4), odd
    ),
    "custom_params": st.one_of(st.dictionaries(texts, json_values, max_size=3), odd),
    "sampling_seed": mostly(st.integers(-(2**63), 2**63 - 1)),
    "priority": odd,
    "do_sample": mostly(st.booleans()),
}  # fmt: skip
GRAMMARS: dict[str, st.SearchStrategy[Any]] = {
    "regex": st.one_of(patterns, odd),
    "json_schema": st.one_of(schemas, odd),
    "ebnf": st.one_of(st.sampled_from(['root ::= "a" root | "b"', "root ::= root", "root ::="]), texts, odd),
    "structural_tag": st.one_of(json_values, odd),
}  # fmt: skip


def sampling_settings(grammars: bool) -> st.SearchStrategy[dict[str, Any]]:
    few = st.lists(st.sampled_from(sorted(SETTINGS)), max_size=4, unique=True)
    chosen = few if not grammars else st.builds(lambda names, g: [*names, g], few, st.sampled_from(sorted(GRAMMARS)))
    return chosen.flatmap(lambda names: st.fixed_dictionaries({n: (SETTINGS | GRAMMARS)[n] for n in names}))


class Requests:
    """Sends one request in one of the ways in which users do."""

    def __init__(self, server: SGLangServer, tokenizer: Any) -> None:
        self.pool = SGLangPool([SGLangClient(server.url)])
        self.tokenizer = tokenizer
        self.chat = SGLangChat(self.pool, tokenizer)
        self.outcomes: Counter[str] = Counter()

    def __call__(self, way: str, given: dict[str, Any], prompts: list[list[int]], text: str, n: int) -> None:
        given = {"max_new_tokens": 4, **given}
        try:
            getattr(self, way)(given, prompts, text, n)
        except ConfigError:
            self.outcomes["refused before sending"] += 1
        except RequestRejectedError as error:
            self.outcomes[f"refused by the server with {error.status}"] += 1
        else:
            self.outcomes["answered"] += 1

    def pool_call(self, given: dict[str, Any], prompts: list[list[int]], text: str, n: int) -> None:
        sampling = SamplingParams.from_kwargs(**given, n=n)
        replies = self.pool.generate(prompts, sampling, prompt_logprobs=n == 1)
        assert len(replies) == len(prompts) * n

    def progress(self, given: dict[str, Any], prompts: list[list[int]], text: str, n: int) -> None:
        self.pool.generate(prompts, SamplingParams.from_kwargs(**given, n=n), progress=lambda tokens: None)

    def stream(self, given: dict[str, Any], prompts: list[list[int]], text: str, n: int) -> None:
        for prompt in prompts[:1]:
            list(self.pool.stream(prompt, SamplingParams.from_kwargs(**given)))

    def adapter(self, given: dict[str, Any], prompts: list[list[int]], text: str, n: int) -> None:
        self.pool.generate(prompts, SamplingParams.from_kwargs(**given), lora=text)

    def tokens(self, given: dict[str, Any], prompts: list[list[int]], text: str, n: int) -> None:
        rows = [TensorDict(tokens=Tokens(prompt=torch.tensor(p, dtype=torch.long))) for p in prompts if max(p) < 2**63]
        if rows:
            policy = SGLangWrapper(
                self.pool, input_mode="tokens", tokenizer=self.tokenizer, generate_kwargs=given, num_samples=n,
                on_error="mask", exact_log_probs=n == 2,
            )  # fmt: skip
            policy(lazy_stack(rows))

    def score(self, given: dict[str, Any], prompts: list[list[int]], text: str, n: int) -> None:
        rows = [TensorDict(tokens=Tokens(full=torch.tensor(p, dtype=torch.long))) for p in prompts if max(p) < 2**63]
        if rows:
            SGLangWrapper(self.pool, input_mode="tokens", tokenizer=self.tokenizer, generate=False)(lazy_stack(rows))

    def text(self, given: dict[str, Any], prompts: list[list[int]], text: str, n: int) -> None:
        policy = SGLangWrapper(self.pool, input_mode="text", tokenizer=self.tokenizer, generate_kwargs=given)
        policy(lazy_stack([TensorDict(text=Text(prompt=text))]))

    def chat_call(self, given: dict[str, Any], prompts: list[list[int]], text: str, n: int) -> None:
        self.chat.chat(text, **given, num_return_sequences=n)

    def iter_chat(self, given: dict[str, Any], prompts: list[list[int]], text: str, n: int) -> None:
        if n == 2:
            given["max_length"] = given.pop("max_new_tokens")
        list(self.chat.iter_chat(text, return_log_probs=True, **given))


WAYS = ("pool_call", "progress", "stream", "adapter", "tokens", "score", "text", "chat_call", "iter_chat")


def fuzz(server: SGLangServer, tokenizer: Any, *, examples: int, grammars: bool) -> Counter[str]:
    """Send random requests; returns how many ended in each way."""
    send = Requests(server, tokenizer)
    before = processes(server)

    @settings(REPEATABLE, max_examples=examples)
    @given(
        way=st.sampled_from(WAYS),
        given_settings=sampling_settings(grammars),
        prompts=st.lists(st.lists(any_ids, min_size=1, max_size=6), min_size=1, max_size=3),
        text=st.one_of(texts, st.just("\ud800")),
        n=st.integers(1, 3),
    )
    def one(way: str, given_settings: dict[str, Any], prompts: list[list[int]], text: str, n: int) -> None:
        send(way, given_settings, prompts, text, n)

    one()
    assert len(send.pool.generate([[5, 6]], SamplingParams(max_new_tokens=2))) == 1
    assert processes(server) == before
    assert {way for way in send.outcomes if "with" in way} <= {f"refused by the server with {n}" for n in (400, 500)}
    return send.outcomes


def processes(server: SGLangServer) -> set[tuple[int, float]]:
    """The server's processes; one that ended and was started again has another pid or time."""
    everything = psutil.Process().children(recursive=True)
    return {(each.pid, each.create_time()) for each in everything if each.status() != psutil.STATUS_ZOMBIE}


def test_random_requests_leave_the_server_alive(server: SGLangServer, tokenizer: Any) -> None:
    outcomes = fuzz(server, tokenizer, examples=300, grammars=False)
    assert outcomes["answered"] > 20, outcomes
    assert outcomes["refused before sending"] > 20, outcomes


@pytest.mark.slow
def test_many_random_requests_leave_the_server_alive(server: SGLangServer, tokenizer: Any) -> None:
    outcomes = fuzz(server, tokenizer, examples=1500, grammars=False)
    assert outcomes["answered"] > 200, outcomes


@pytest.mark.slow
def test_random_grammars_leave_the_server_alive(special_server: Callable[..., SGLangServer], tokenizer: Any) -> None:
    server = special_server(extra_args=("--grammar-backend", "xgrammar"))
    outcomes = fuzz(server, tokenizer, examples=800, grammars=True)
    assert outcomes["answered"] > 50, outcomes
    assert outcomes["refused by the server with 400"] > 10, outcomes
