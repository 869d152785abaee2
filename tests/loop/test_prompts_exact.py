"""A real server of a SentencePiece model in another revision sees, and answers, exactly what transformers would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import constants
from tensordict import TensorDict
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory

from tests.loop.rollout_cases import greedy, reference_log_probs, rows
from tests.tokenizers_made import INST, make_tokenizer
from torchrl_sglang import AsyncSGLang, SGLangWrapper
from torchrl_sglang.server import SGLangServer

# In `make test`, tests/quick/test_prompt_revision.py and the matrix's SentencePiece model show the parts of this.
pytestmark = pytest.mark.slow

NAME = "org/tiny"
VOCAB_SIZE = 576  # padded beyond the tokenizer
QUESTION = "What is the capital of France?"
SETTINGS = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}


def write_revision(folder: Path, tokenizer: Any, seed: int) -> None:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub cache with one model in two revisions: other weights, another chat template."""
    cache = tmp_path_factory.mktemp("hub")
    folder = cache / "models--org--tiny"
    for number, revision in enumerate(("main", "B")):
        commit = str(number) * 40
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / revision).write_text(commit)
        template = INST if revision == "B" else "not this one"
        write_revision(folder / "snapshots" / commit, make_tokenizer("sentencepiece", chat_template=template), number)
    return cache


@pytest.fixture
def engine(
    hub: Path, special_server: Callable[..., SGLangServer], monkeypatch: pytest.MonkeyPatch
) -> Iterator[AsyncSGLang]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    env = {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    with AsyncSGLang.connect(special_server(model=NAME, extra_args=("--revision", "B"), env=env).url) as connected:
        yield connected


@pytest.fixture
def reference(hub: Path) -> tuple[Any, Any]:
    """The model and the tokenizer of revision B."""
    folder = hub / "models--org--tiny" / "snapshots" / ("1" * 40)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def test_revision_prompts_responses_and_a_second_turn_are_those_of_transformers(
    engine: AsyncSGLang, reference: tuple[Any, Any]
) -> None:
    model, tokenizer = reference
    assert engine.pool.info.revision == "B"
    assert engine.pool.vocab_size == VOCAB_SIZE
    assert engine.tokenizer.chat_template == INST
    assert engine.weights.get_model_metadata()["lm_head.weight"][1] == (VOCAB_SIZE, 64)
    policy = SGLangWrapper(engine, input_mode="history", generate_kwargs=SETTINGS, prefer_tokens=True)
    talk = [{"role": "user", "content": QUESTION}]
    td = TensorDict(history=ChatHistory(prompt=History.from_chats([talk]), batch_size=[1]), batch_size=[1])
    td = policy(td)
    prompt = tokenizer.apply_chat_template(talk, return_dict=False)
    answer = greedy(model, prompt, 6, min_new_tokens=6)
    assert rows(td, "tokens", "full")[0].tolist() == [*prompt, *answer]
    assert td["text"].response[0] == engine.generate(input_ids=prompt, **SETTINGS, skip_special_tokens=False).text

    asked = History.from_chats([[{"role": "user", "content": "And of 2 + 3?"}]])
    td["history"] = ChatHistory(prompt=td["history"].full.extend(asked, dim=-1, inplace=False), batch_size=[1])
    td = policy(td)
    second = rows(td, "tokens", "prompt")[0].tolist()
    assert second[: len(prompt) + 6] == [*prompt, *answer]
    rest = tokenizer("a </s>[INST] And of 2 + 3? [/INST]", add_special_tokens=False)["input_ids"]
    assert second[len(prompt) + 6 :] == rest[len(tokenizer("a", add_special_tokens=False)["input_ids"]) :]
    assert rows(td, "tokens", "response")[0].tolist() == greedy(model, second, 6, min_new_tokens=6)


def test_scores_of_conversations_and_texts_are_those_of_transformers(
    engine: AsyncSGLang, reference: tuple[Any, Any]
) -> None:
    model, tokenizer = reference
    talk = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "Paris."}]
    td = TensorDict(history=ChatHistory(full=History.from_chats([talk]), batch_size=[1]), batch_size=[1])
    out = SGLangWrapper(engine, input_mode="history", generate=False)(td)
    ids = torch.tensor(tokenizer.apply_chat_template(talk, return_dict=False))
    assert rows(out, "tokens", "full")[0].tolist() == ids.tolist()
    torch.testing.assert_close(rows(out, "log_probs", "full")[0], reference_log_probs(model, ids), atol=1e-4, rtol=0)
    mask = rows(out, "masks", "all_assistant_mask")[0]
    assert tokenizer.decode(ids[mask]) == "Paris."
    rendered = tokenizer.apply_chat_template(talk, tokenize=False)
    out = SGLangWrapper(engine, input_mode="text", generate=False)(
        TensorDict({("text", "full"): rendered}, batch_size=1)
    )
    torch.testing.assert_close(rows(out, "log_probs", "full")[0], reference_log_probs(model, ids), atol=1e-4, rtol=0)
