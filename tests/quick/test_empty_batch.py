"""A batch without prompts has the entries of any other batch, of size 0, and nothing is sent for it."""

from __future__ import annotations

from typing import Any

import pytest
from tensordict import TensorDict, TensorDictBase
from torchrl.data.llm import History

from torchrl_sglang import SGLangWrapper
from torchrl_sglang.testing import EchoPool

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


class SilentPool(EchoPool):
    """Refuses every request."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("something was sent for an empty batch")


def prompts(mode: str, generate: bool, size: int) -> TensorDict:
    part = "prompt" if generate else "full"
    if size == 0:
        return TensorDict(batch_size=[0])
    values: dict[str, Any] = {
        "tokens": {("tokens", part): [[5, 6, 7]] * size, "attention_mask": [[1, 1, 1]] * size},
        "text": {("text", part): ["hello"] * size},
        "history": {("history", part): History.from_chats([CHAT[: 1 if generate else 2]] * size)},
    }
    return TensorDict(values[mode], batch_size=[size])


def keys(td: TensorDictBase) -> set[Any]:
    return set(td.keys(include_nested=True, leaves_only=True))


@pytest.mark.parametrize("inplace", [None, False])
@pytest.mark.parametrize("pad_output", [False, True])
@pytest.mark.parametrize(
    ("mode", "generate", "options"),
    [
        *((mode, True, {}) for mode in ("tokens", "text", "history")),
        *((mode, True, {"num_samples": n}) for mode in ("tokens", "text", "history") for n in (1, 3)),
        *((mode, False, {}) for mode in ("tokens", "text", "history")),
        ("tokens", True, {"policy_version_key": "version", "generate_kwargs": {"prompt_logprobs": True}}),
        ("tokens", True, {"return_log_probs": False, "generation_key": None}),
        ("text", True, {"text_key": ("mine", "text"), "tokens_key": "ids"}),
    ],
)
def test_an_empty_batch_has_the_entries_of_a_full_one(
    mode: str, generate: bool, options: dict[str, Any], pad_output: bool, inplace: bool | None, tokenizer: Any
) -> None:
    settings = {"input_mode": mode, "generate": generate, "pad_output": pad_output, "tokenizer": tokenizer}
    policy = SGLangWrapper(EchoPool(), inplace=inplace, **settings, **options)
    full = policy(prompts(mode, generate, 2))
    silent = policy.get_new_version(model=SilentPool())
    assert silent.out_keys == policy.out_keys
    empty = silent(prompts(mode, generate, 0))
    given = {key for key in keys(full) if key in keys(prompts(mode, generate, 2)) and key not in keys(empty)}
    assert keys(full) - given == keys(empty)
    assert all(empty.get(key) is not None for key in policy.out_keys)
    assert tuple(empty.batch_size) == (0, *full.batch_size[1:])
    for key in policy.out_keys:
        assert type(empty.get(key)) is type(full.get(key))
        assert tuple(empty.get(key).shape[: empty.ndim]) == tuple(empty.batch_size)


def test_the_shape_of_an_empty_batch_is_kept() -> None:
    policy = SGLangWrapper(SilentPool(), input_mode="tokens", num_samples=2)
    assert policy(TensorDict(batch_size=[3, 0])).batch_size == (3, 0, 2)
    assert policy(TensorDict(batch_size=[0, 3]))["generation"].batch_size == (0, 3, 2)


def test_an_empty_batch_does_not_hide_a_wrong_argument() -> None:
    policy = SGLangWrapper(SilentPool(), input_mode="tokens")
    with pytest.raises(ValueError, match="Did you mean 'max_tokens'"):
        policy(TensorDict(batch_size=[0]), max_tokns=1)
