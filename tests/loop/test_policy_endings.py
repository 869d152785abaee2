"""Ids, log-probs, masks and text stay aligned however a response ends or is interrupted."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase, lazy_stack
from transformers import AutoModelForCausalLM

from tests.loop.rollout_cases import greedy, make_input, reference_log_probs, rows
from torchrl_sglang import AsyncSGLang, ConfigError, SGLangWrapper
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.protocol.control import build_continue, build_pause, build_update_from_disk
from torchrl_sglang.server import SGLangServer

LENGTH = 20
PROMPT = "The quick brown fox"


@pytest.fixture(scope="module")
def whole(model: Any, tokenizer: Any) -> list[int]:
    """What greedy decoding says after the prompt when nothing stops it."""
    return greedy(model, tokenizer(PROMPT)["input_ids"], LENGTH, eos_token_id=None)


def said(engine: AsyncSGLang, **kwargs: Any) -> TensorDictBase:
    policy = SGLangWrapper(
        engine, input_mode="text", generate_kwargs={"max_new_tokens": LENGTH, "temperature": 0, **kwargs}
    )
    return policy(TensorDict({("text", "prompt"): PROMPT}))


def assert_aligned(model: Any, td: TensorDictBase, response: list[int]) -> None:
    prompt, full = td["tokens", "prompt"], td["tokens", "full"]
    assert td["tokens", "response"].tolist() == response
    assert full.tolist() == [*prompt.tolist(), *response]
    expected = reference_log_probs(model, full)[len(prompt) :]
    torch.testing.assert_close(td["log_probs", "response"], expected, atol=1e-4, rtol=0)
    assert td["masks", "all_assistant_mask"].tolist() == [False] * len(prompt) + [True] * len(response)
    assert len(td["generation"].weight_version) == len(response)
    assert int(td["generation"].completion_tokens) == len(response)
    assert td["text"].full == td["text"].prompt + td["text"].response


def test_a_stop_token_is_part_of_the_response(
    engine: AsyncSGLang, model: Any, tokenizer: Any, whole: list[int]
) -> None:
    end = next(i for i in range(3, LENGTH) if whole[i] not in whole[:i])
    td = said(engine, stop_token_ids=[whole[end]])
    assert_aligned(model, td, whole[: end + 1])
    assert td["text"].response == tokenizer.decode(whole[: end + 1])
    generation = td["generation"]
    assert (generation.finish_reason, generation.matched, bool(generation.truncated)) == ("stop", whole[end], False)


def test_a_stop_string_is_in_the_ids_and_in_the_text_unless_trimmed(
    engine: AsyncSGLang, model: Any, tokenizer: Any, whole: list[int]
) -> None:
    text = tokenizer.decode(whole)
    stop = next(c for c in text[2:] if c.isascii() and c.isprintable() and text.index(c) > 1)
    td = said(engine, stop_sequences=[stop])
    response = td["tokens", "response"].tolist()
    assert_aligned(model, td, whole[: len(response)])
    assert stop in tokenizer.decode(response)
    assert stop not in tokenizer.decode(response[:-1])
    assert td["text"].response == tokenizer.decode(response)
    assert (td["generation"].finish_reason, td["generation"].matched) == ("stop", stop)
    trimmed = said(engine, stop_sequences=[stop], include_stop_str_in_output=False)
    assert trimmed["tokens", "response"].tolist() == response
    assert trimmed["text"].response == tokenizer.decode(response).rpartition(stop)[0]


def test_eos_ends_a_response_unless_ignored(engine: AsyncSGLang, model: Any, tokenizer: Any) -> None:
    eos = tokenizer.eos_token_id
    likely = {"logit_bias": {str(eos): 100.0}, "max_new_tokens": 3}
    ended = said(engine, **likely)
    assert ended["tokens", "response"].tolist() == [eos]
    assert (ended["generation"].finish_reason, ended["generation"].matched) == ("stop", eos)
    ignored = said(engine, ignore_eos=True, **likely)
    assert ignored["tokens", "response"].tolist() == [eos] * 3
    assert ignored["generation"].finish_reason == "length"
    assert bool(ignored["generation"].truncated)


@pytest.mark.parametrize("pad_output", [False, True], ids=["ragged", "padded"])
@pytest.mark.parametrize("mode", ["history", "text", "tokens"])
def test_no_new_tokens_are_an_empty_response(engine: AsyncSGLang, mode: str, pad_output: bool) -> None:
    policy = SGLangWrapper(engine, input_mode=mode, pad_output=pad_output, generate_kwargs={"max_new_tokens": 0})
    td = policy(make_input(mode, generate=True))
    assert [len(r) for r in rows(td, "tokens", "response")] == [0, 0, 0]
    for full, prompt in zip(rows(td, "tokens", "full"), rows(td, "tokens", "prompt"), strict=True):
        assert torch.equal(full, prompt)
    assert [len(r) for r in rows(td, "log_probs", "response")] == [0, 0, 0]
    assert not any(mask.any() for mask in rows(td, "masks", "all_assistant_mask"))


def test_prompt_logprobs_fills_the_full_log_probs(engine: AsyncSGLang, model: Any) -> None:
    td = said(engine, prompt_logprobs=True)
    expected = reference_log_probs(model, td["tokens", "full"])
    torch.testing.assert_close(td["log_probs", "full"], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("on_error", ["raise", "mask"])
def test_a_prompt_longer_than_the_context_is_not_sent(engine: AsyncSGLang, on_error: str) -> None:
    td = lazy_stack([TensorDict({("tokens", "prompt"): torch.full((n,), 5)}) for n in (3, 4000)])
    sampling = {"max_new_tokens": 4, "ignore_eos": True}
    policy = SGLangWrapper(engine, input_mode="tokens", on_error=on_error, generate_kwargs=sampling)
    if on_error == "raise":
        with pytest.raises(ConfigError, match="prompt 1 has 4000 tokens"):
            policy(td)
        cut = policy.get_new_version(on_overlong="truncate_left")(td)["generation"]
        assert (cut.prompt_tokens + cut.dropped_tokens).tolist() == [3, 4000]
        assert cut.completion_tokens.tolist() == [4, 4]
    else:
        generation = policy(td)["generation"]
        assert generation.completion_tokens.tolist() == [4, 0]
        assert generation.finish_reason[1] == "error"
        assert "4000 tokens" in generation.error[1]


def test_progress_is_shown_and_changes_nothing(engine: AsyncSGLang, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"input_mode": "tokens", "generate_kwargs": {"max_new_tokens": 30, "temperature": 0}, "num_samples": 2}
    quiet = SGLangWrapper(engine, **settings)(make_input("tokens", generate=True))
    assert "tok" not in capsys.readouterr().err
    shown = SGLangWrapper(engine, progress=True, **settings)(make_input("tokens", generate=True))
    assert "tok/s" in capsys.readouterr().err
    for a, b in zip(rows(quiet, "tokens", "full"), rows(shown, "tokens", "full"), strict=True):
        assert torch.equal(a, b)


# --------------------------------------------------------------------------------------------- interrupted by an update


def run_interrupted(policy: SGLangWrapper, interrupt: Any) -> TensorDictBase:
    """Generate a long batch in a thread, and interrupt it while it runs."""
    found: dict[str, TensorDictBase] = {}
    client = policy.pool.clients[0]
    thread = threading.Thread(target=lambda: found.update(td=policy(make_input("tokens", generate=True))))
    thread.start()
    time.sleep(0.3)  # if the batch is not running yet, or has ended, the assertions on resumes and versions say so
    interrupt(client)
    thread.join(timeout=120)
    return found["td"]


LONG = {"max_new_tokens": 1500, "temperature": 0, "ignore_eos": True}


def test_an_aborted_batch_is_completed(pristine_server: SGLangServer, model: Any) -> None:
    def abort(client: SGLangClient) -> None:
        client.send(build_pause("abort"))
        client.send(build_continue())

    with AsyncSGLang.connect(pristine_server.url) as engine:
        policy = SGLangWrapper(engine, input_mode="tokens", generate_kwargs=LONG)
        cut = run_interrupted(policy, abort)
        whole = policy(make_input("tokens", generate=True))
    assert cut["generation"].resumes.tolist() == [1, 1, 1]
    assert list(cut["generation"].finish_reason) == ["length"] * 3
    for key in (("tokens", "full"), ("log_probs", "response")):
        for a, b in zip(rows(cut, *key), rows(whole, *key), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", ["abort", "retract"])
def test_every_token_has_the_version_of_the_weights_that_generated_it(
    pristine_server: SGLangServer, model: Any, tiny_llama_b: Path, mode: str
) -> None:
    def update(client: SGLangClient) -> None:
        client.send(build_pause(mode))
        client.send(build_update_from_disk(str(tiny_llama_b), version="7@test"))
        client.send(build_continue())

    other = AutoModelForCausalLM.from_pretrained(tiny_llama_b, dtype=torch.float32).eval()
    with AsyncSGLang.connect(pristine_server.url) as engine:
        td = run_interrupted(SGLangWrapper(engine, input_mode="tokens", generate_kwargs=LONG), update)
    assert td["generation"].policy_version.tolist() == [0, 0, 0]
    for prompt, full, versions, scores in zip(
        rows(td, "tokens", "prompt"),
        rows(td, "tokens", "full"),
        rows(td, "generation", "weight_version"),
        rows(td, "log_probs", "response"),
        strict=True,
    ):
        before = int((versions == 0).sum())
        assert 0 < before < len(versions)
        assert versions.tolist() == [0] * before + [7] * (len(versions) - before)
        for made_by, part in ((model, slice(0, before)), (other, slice(before, None))):
            expected = reference_log_probs(made_by, full)[len(prompt) :]
            torch.testing.assert_close(scores[part], expected[part], atol=1e-3, rtol=0)


def test_threads_with_one_prompt_each_share_a_request(engine: AsyncSGLang) -> None:
    settings = {"input_mode": "tokens", "generate_kwargs": {"max_new_tokens": 16, "temperature": 0}}
    shared = SGLangWrapper(engine, batching=True, min_batch_size=16, batching_timeout=60, **settings)
    alone = SGLangWrapper(engine, **settings)

    def prompt(i: int) -> TensorDict:
        return TensorDict({("tokens", "prompt"): torch.tensor([i + 5, i + 6])})

    answers: dict[int, TensorDictBase] = {}
    threads = [threading.Thread(target=lambda i=i: answers.update({i: shared(prompt(i))})) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    for i in range(16):
        assert torch.equal(answers[i]["tokens", "full"], alone(prompt(i))["tokens", "full"])
