"""Chat on real servers: responses equal those of the model in transformers, streamed or not, and with images."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from torchrl_sglang.chat import Response, SGLangChat
from torchrl_sglang.errors import ConfigError, ServerUnreachableError
from torchrl_sglang.protocol.control import build_loads, parse_loads
from torchrl_sglang.server import SGLangServer

QUESTION = [{"role": "user", "content": "What is 2 + 3?"}]
NEW_TOKENS = 24


@pytest.fixture
def chat(server: SGLangServer) -> SGLangChat:
    return SGLangChat(server.url, temperature=0, max_new_tokens=NEW_TOKENS)


def greedy(model: Any, ids_T: list[int], count: int = NEW_TOKENS) -> list[int]:
    """The model's own greedy continuation, up to and with EOS."""
    with torch.no_grad():
        full = model.generate(torch.tensor([ids_T]), max_new_tokens=count, do_sample=False)
    return full[0, len(ids_T) :].tolist()


def rendered(tokenizer: Any, messages: list[dict[str, Any]]) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_chat_returns_the_models_tokens_and_log_probs(chat: SGLangChat, tiny_llama: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    messages = [{"role": "system", "content": "Be brief."}, *QUESTION]
    prompt = rendered(tokenizer, messages)

    (response,) = chat.chat(QUESTION, system="Be brief.", return_log_probs=True)

    expected = greedy(model, prompt)
    assert list(response.token_ids) == expected
    ended = expected[-1] == tokenizer.eos_token_id
    assert response.text == tokenizer.decode(expected[:-1] if ended else expected, skip_special_tokens=True)
    assert (response.prompt_length, response.response_length) == (len(prompt), len(expected))
    assert response.finish_reason == ("stop" if ended else "length")
    with torch.no_grad():
        logits = model(torch.tensor([prompt + expected])).logits[0, len(prompt) - 1 : -1]
    true = logits.log_softmax(-1)[torch.arange(len(expected)), expected]
    assert response.log_probs == pytest.approx(true.tolist(), abs=1e-4)
    assert chat.chat(QUESTION)[0].log_probs is None


def test_the_pieces_of_a_stream_joined_are_the_whole_text(chat: SGLangChat) -> None:
    whole = chat.chat(QUESTION)[0]
    finished: list[Response] = []
    pieces = list(chat.iter_chat(QUESTION, on_finish=finished.append))
    assert "".join(pieces) == whole.text
    assert len(pieces) > 3
    assert all(pieces)
    assert finished == [whole]

    async def together() -> tuple[str, list[list[Response]]]:
        text = "".join([piece async for piece in chat.stream_chat(QUESTION)])
        return text, await asyncio.gather(*(chat.achat(QUESTION) for _ in range(3)))

    text, answers = asyncio.run(together())
    assert text == whole.text
    assert answers == [[whole]] * 3


def test_stop_strings_end_a_response_and_are_not_in_it_streamed_or_not(chat: SGLangChat) -> None:
    text = chat.chat(QUESTION)[0].text
    stop = next(text[i : i + 2] for i in range(3, len(text)) if text[i : i + 2].isascii() and text[i : i + 2].strip())
    (response,) = chat.chat(QUESTION, stop=[stop, "never said"])
    assert response.finish_reason == "stop"
    assert response.text == text[: text.index(stop)]
    assert "".join(chat.iter_chat(QUESTION, stop=[stop, "never said"])) == response.text
    assert response.response_length < NEW_TOKENS


def test_a_call_can_ask_for_several_responses_and_its_settings_replace_the_defaults(chat: SGLangChat) -> None:
    responses = chat.chat(QUESTION, num_return_sequences=3, temperature=1.0, max_new_tokens=8)
    assert len(responses) == 3
    assert len({r.token_ids for r in responses}) > 1
    assert all(r.response_length <= 8 for r in responses)
    assert len(chat.chat(QUESTION)) == 1  # and the next call has the defaults again
    prompt = chat.chat(QUESTION)[0].prompt_length
    assert chat.chat(QUESTION, max_length=prompt + 5, ignore_eos=True)[0].response_length == 5
    raw = chat.chat([*QUESTION, {"role": "assistant", "content": "5"}], skip_special_tokens=False, stop_token_ids=[])
    assert raw[0].prompt_length != prompt, "an assistant's last message is continued"


def test_leaving_a_stream_early_ends_the_request_on_the_server(chat: SGLangChat) -> None:
    async def peek() -> str:
        async with contextlib.aclosing(chat.stream_chat(QUESTION, ignore_eos=True, max_new_tokens=1900)) as stream:
            return await anext(stream)

    stream = chat.iter_chat(QUESTION, ignore_eos=True, max_new_tokens=1900)
    first = next(stream)
    stream.close()
    assert asyncio.run(peek()) == first
    deadline = time.monotonic() + 30
    client = chat.pool.clients[0]
    while (running := parse_loads(client.send(build_loads()))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert running == 0


def test_settings_that_the_server_can_not_honour_are_refused_before_sending(chat: SGLangChat) -> None:
    for words, call in {
        "would ignore it": {"seed": 1, "temperature": 1.0},
        "--enable-lora": {"adapter": "kind"},
        "leaves no room": {"max_length": 3},
        "more than the context length": {"max_new_tokens": 99_999},
        "Did you mean 'temperature'": {"temprature": 1},
        "no place for images": {"images": ["http://host/a.png"]},
    }.items():
        with pytest.raises(ConfigError, match=words):
            chat.chat(QUESTION, **call)
    with pytest.raises(ConfigError, match="for one response"):
        chat.iter_chat(QUESTION, num_return_sequences=2)
    with pytest.raises(ConfigError, match="temprature"):
        SGLangChat(chat.pool, temprature=1)
    with pytest.raises(ServerUnreachableError):
        SGLangChat("http://127.0.0.1:9")


def test_tool_calls_can_be_parsed_by_the_server(server: SGLangServer, tiny_llama: Path) -> None:
    from torchrl_sglang.client import SGLangClient
    from torchrl_sglang.protocol.tool_calls import build_parse_tool_calls, parse_tool_calls_answer

    text = 'Let me see. <tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    answer = SGLangClient(server.url).send(build_parse_tool_calls(text, tools, "qwen25"))
    assert parse_tool_calls_answer(answer, server=server.url) == (
        "Let me see.",
        [("add", '{"a": 1, "b": 2}')],
    )
    chat = SGLangChat(server.url, tool_call_parser="qwen25", max_new_tokens=4, temperature=0)
    assert chat.chat(QUESTION, tools=tools)[0].tool_calls == ()


# -------------------------------------------------------------------------------------------------------------- images


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("PIL")
    from torchrl_sglang.testing.vision import make_tiny_vision_model

    return make_tiny_vision_model(tmp_path_factory.mktemp("models") / "sees")


def embedded(folder: Path, ids_T: list[int], images: list[Any]) -> tuple[Any, torch.Tensor]:
    """A language model, and the embeddings of a prompt with images, put together from transformers' own parts."""
    from safetensors.torch import load_file

    processor = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
    tower = transformers.CLIPVisionModel.from_pretrained(folder / "clip_tower", dtype=torch.float16).eval()
    config = transformers.AutoConfig.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    language = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config.text_config.to_dict())).half().eval()
    language.load_state_dict({name: value for name, value in weights.items() if "mm_projector" not in name})
    linear = torch.nn.functional.linear
    parts: list[torch.Tensor] = []
    waiting = iter(images)
    with torch.no_grad():
        for is_image, group in itertools.groupby(ids_T, lambda i: i == config.image_token_index):
            if not is_image:
                parts.append(language.get_input_embeddings()(torch.tensor(list(group))))
                continue
            for _ in group:
                pixels = torch.as_tensor(processor.image_processor(next(waiting))["pixel_values"][0])[None].half()
                features = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
                p = "model.mm_projector"
                hidden = torch.nn.functional.gelu(linear(features, weights[f"{p}.0.weight"], weights[f"{p}.0.bias"]))
                parts.append(linear(hidden, weights[f"{p}.2.weight"], weights[f"{p}.2.bias"])[0])
    return language, torch.cat(parts)


def seen(folder: Path, ids_T: list[int], images: list[Any], count: int) -> list[int]:
    """Greedy continuation of a prompt with images, in half precision."""
    language, embedded_T = embedded(folder, ids_T, images)
    with torch.no_grad():
        out = language.generate(
            inputs_embeds=embedded_T[None],
            attention_mask=torch.ones(1, len(embedded_T), dtype=torch.long),
            max_new_tokens=count,
            do_sample=False,
        )
    return out[0].tolist()


@pytest.fixture(scope="module")
def pictures() -> list[Any]:
    image = pytest.importorskip("PIL.Image")
    sides = image.linear_gradient("L").resize((40, 40)).convert("RGB")
    rings = image.radial_gradient("L").resize((40, 40)).convert("RGB")
    return [image.new("RGB", (40, 30), "red"), sides, rings]


@pytest.mark.slow
@pytest.mark.timeout(480)
def test_a_vision_model_gets_the_same_image_in_every_form(
    special_server: Callable[..., SGLangServer], vision_model: Path, pictures: list[Any], tmp_path: Path
) -> None:
    import numpy as np

    from torchrl_sglang.testing.vision import VISION_SERVER_ARGS, VISION_SERVER_DTYPE

    server = special_server(model=str(vision_model), dtype=VISION_SERVER_DTYPE, extra_args=VISION_SERVER_ARGS)
    chat = SGLangChat(server.url, temperature=0, max_new_tokens=8)
    red, sides, rings = pictures
    one = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    prompt = rendered(chat.tokenizer, [{"role": "user", "content": one}])
    blind = chat.chat("What is it?")[0]
    answers = [chat.chat("What is it?", images=[picture])[0] for picture in pictures]
    assert len({answer.token_ids for answer in (blind, *answers)}) == 4
    for answer, picture in zip(answers, pictures, strict=True):
        assert list(answer.token_ids) == seen(vision_model, prompt, [picture], 8)
        assert answer.prompt_length == blind.prompt_length + 4, "an image is four tokens"

    # Square ones: of several images, SGLang pads each to a square for models of this form, which transformers does not.
    two = [{"type": "image"}, {"type": "text", "text": "Or: "}, {"type": "image"}, {"type": "text", "text": "?"}]
    prompt = rendered(chat.tokenizer, [{"role": "user", "content": two}])
    for first, second in ((sides, rings), (rings, sides)):
        answer = chat.chat("<image>Or: <image>?", images=[first, second])[0]
        assert list(answer.token_ids) == seen(vision_model, prompt, [first, second], 8)

    path = tmp_path / "red.png"
    red.save(path)
    file = io.BytesIO()
    red.save(file, "PNG")
    array = np.asarray(red)
    for form in (path, str(path), file.getvalue(), array, torch.from_numpy(array.copy()).permute(2, 0, 1), array / 255):
        assert chat.chat("What is it?", images=[form])[0].token_ids == answers[0].token_ids
    parts = [{"type": "image", "image": red}, {"type": "text", "text": "What is it?"}]
    assert chat.chat([{"role": "user", "content": parts}])[0].token_ids == answers[0].token_ids
    assert "".join(chat.iter_chat("What is it?", images=[red])) == answers[0].text


@pytest.fixture(autouse=True)
def few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
