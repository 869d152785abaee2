"""A conversation goes on from the tokens it has: what follows them is what the template renders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory

from tests.tokenizers_made import CHATML, INST, KINDS, THINKING, make_tokenizer
from torchrl_sglang import SGLangWrapper
from torchrl_sglang.chat_templates import ChatRenderer
from torchrl_sglang.protocol.messages import GenerateReply
from torchrl_sglang.rollout.incremental_tokens import continue_tokens
from torchrl_sglang.testing.echo_pool import EchoPool

PLAIN = (
    "{% for m in messages %}{{ 'User: ' if m.role == 'user' else 'Bot: ' }}{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Bot: {% endif %}"
)
"""No special tokens: the end of an answer is a line's end."""


class Scripted(EchoPool):
    """Answers with given tokens, one list per request."""

    def __init__(self, vocab_size: int, answers: Sequence[Sequence[int]], stops: Sequence[Any] = ()) -> None:
        super().__init__(vocab_size=vocab_size)
        self.answers, self.stops = list(answers), list(stops)

    def generate(self, ids_B_T: Any, sampling: Any, **kwargs: Any) -> list[GenerateReply]:
        number = len(self.requests)
        self.requests.append([list(ids_T) for ids_T in ids_B_T])
        ids = list(self.answers[number])
        stop = self.stops[number] if number < len(self.stops) else None
        return [
            GenerateReply(
                output_ids=ids,
                output_logprobs=[-0.5] * len(ids),
                finish_reason="length" if stop is None else "stop",
                matched=stop,
                prompt_tokens=len(ids_B_T[0]),
                completion_tokens=len(ids),
            )
        ]


def converse(tokenizer: Any, answers: list[list[int]], stops: list[Any], questions: list[str], **kwargs: Any) -> Any:
    """Run the turns; returns the pool and, per turn, the output."""
    pool = Scripted(len(tokenizer), answers, stops)
    policy = SGLangWrapper(pool, tokenizer=tokenizer, **{"prefer_tokens": True, **kwargs})
    history = History.from_chats([[{"role": "user", "content": questions[0]}]])
    td = TensorDict(history=ChatHistory(prompt=history, batch_size=[1]), batch_size=[1])
    outs = []
    for turn in range(len(answers)):
        td = policy(td)
        outs.append(td.clone())
        if turn + 1 < len(questions):
            asked = History.from_chats([[{"role": "user", "content": questions[turn + 1]}]])
            td["history"] = ChatHistory(prompt=td["history"].full.extend(asked, dim=-1, inplace=False), batch_size=[1])
    return pool, outs


def one(td: Any, *key: str) -> list[int]:
    return list(td.get(key, as_list=True)[0].tolist())


def canonical(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def spelled(tokenizer: Any, text: str) -> list[int]:
    """Tokens of single characters, as no tokenizer would choose them, behind other text."""
    if tokenizer.backend_tokenizer.decoder.__class__.__name__ == "ByteLevel":
        marks = text.replace(" ", "Ġ")
    else:
        marks = text.replace(" ", "▁")
    return [tokenizer.convert_tokens_to_ids(character) for character in marks]


CASES = [
    (kind, template, prefix_space)
    for kind in KINDS
    for template in (CHATML, INST, PLAIN)
    for prefix_space in (("first", "always", "never") if kind in ("sentencepiece", "unigram") else ("first",))
    if not (kind == "wordpiece" and template is INST)
]


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize(("kind", "template", "prefix_space"), CASES)
def test_three_turns_keep_all_tokens_and_add_what_the_template_renders(
    kind: Any, template: str, prefix_space: Any, ended: bool
) -> None:
    tokenizer = make_tokenizer(kind, chat_template=template, prefix_space=prefix_space)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>") if template is CHATML else tokenizer.eos_token_id
    if end is None:
        end = tokenizer.sep_token_id
    if kind == "wordpiece":
        texts = [["paris", "is"], ["the", "fox"]]
        said = [[tokenizer.convert_tokens_to_ids(word) for word in text] for text in texts]
    else:
        said = [spelled(tokenizer, " Paris is"), spelled(tokenizer, "the fox")]
    stops = [end, end, end] if ended else [None] * 3
    answers = [[*ids, *([end] if ended else [])] for ids in (*said, said[0])]
    questions = ["The capital of France?", "What is 2 + 3?", "Hello world!"]
    pool, outs = converse(tokenizer, answers, stops, questions)
    first, second, third = (request[0] for request in pool.requests)
    assert first == canonical(tokenizer, [{"role": "user", "content": questions[0]}])
    fulls = [one(out, "tokens", "full") for out in outs]
    assert second[: len(fulls[0])] == fulls[0] == [*first, *answers[0]]
    assert third[: len(fulls[1])] == fulls[1]
    # What follows: the end of the whole rendering's own tokens, from the end of the answer on.
    messages = [{"role": "user", "content": questions[0]}]
    for turn, prompt in ((0, second), (1, third)):
        content = outs[turn]["history"].response.content[0][0]
        assert content.strip() == tokenizer.decode(said[turn]).strip()
        messages += [{"role": "assistant", "content": content}, {"role": "user", "content": questions[turn + 1]}]
        added = prompt[len(fulls[turn]) :]
        whole = canonical(tokenizer, messages)
        assert whole[-len(added) :] == added
        before = tokenizer.decode(whole[: len(whole) - len(added)]).rstrip()
        assert before.endswith((content.strip(), tokenizer.decode([end])))
        rest = tokenizer.decode(added)
        assert (questions[turn + 1] if kind != "wordpiece" else "?" if turn == 0 else "hello world !") in rest
        if ended and template is not PLAIN:
            assert added[0] != end
        closed = {CHATML: "<|im_end|>", INST: "</s>", PLAIN: ""}[template]
        assert rest.startswith(closed) or rest.lstrip().startswith(closed) or ended


def test_a_template_that_rewrites_an_answer_decides_the_prompt_unless_tokens_are_always_preferred() -> None:
    tokenizer = make_tokenizer("byte-level", chat_template=THINKING)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    said = tokenizer("<think>hm</think>\nParis.", add_special_tokens=False)["input_ids"]
    answers = [[*said, end]] * 2
    questions = ["The capital of France?", "What is 2 + 3?"]
    with pytest.warns(UserWarning, match="batch index 0 are not kept.*prefer_tokens='always'"):
        pool, outs = converse(tokenizer, answers, [end, end], questions)
    content = "<think>hm</think>\nParis."
    assert list(outs[0]["history"].response.content[0]) == [content]
    talk = [
        {"role": "user", "content": questions[0]},
        {"role": "assistant", "content": content},
        {"role": "user", "content": questions[1]},
    ]
    assert pool.requests[1][0] == canonical(tokenizer, talk)
    assert "hm" not in tokenizer.decode(pool.requests[1][0])
    pool, outs = converse(tokenizer, answers, [end, end], questions, prefer_tokens="always")
    known = [*pool.requests[0][0], *answers[0]]
    assert pool.requests[1][0][: len(known)] == known
    rest = tokenizer.decode(pool.requests[1][0][len(known) :])
    assert rest == "\n<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n"
    pool, _ = converse(tokenizer, answers, [end, end], questions, prefer_tokens=False)
    assert pool.requests[1][0] == canonical(tokenizer, talk)


def test_the_token_that_ended_an_answer_stands_for_the_templates_own() -> None:
    eom = tokenizers.AddedToken("<|eom_id|>", special=True)
    tokenizer = make_tokenizer("byte-level", more_tokens=(eom,))
    end = tokenizer.convert_tokens_to_ids("<|eom_id|>")
    said = tokenizer("Paris.", add_special_tokens=False)["input_ids"]
    pool, outs = converse(tokenizer, [[*said, end]] * 2, [end, end], ["The capital of France?", "Hello?"])
    assert list(outs[0]["history"].response.content[0]) == ["Paris."]
    assert outs[0]["text"].response[0] == "Paris.<|eom_id|>"
    known = [*pool.requests[0][0], *said, end]
    assert pool.requests[1][0][: len(known)] == known
    added = tokenizer.decode(pool.requests[1][0][len(known) :])
    assert added == "\n<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n"
    pool, _ = converse(
        tokenizer, [[*said, end]] * 2, [end, end], ["The capital of France?", "Hello?"], prefer_tokens=False
    )
    assert "eom" not in tokenizer.decode(pool.requests[1][0])


def test_an_end_token_at_the_length_limit_is_not_content_either() -> None:
    eom = tokenizers.AddedToken("<|eom_id|>", special=True)
    tokenizer = make_tokenizer("byte-level", more_tokens=(eom,))
    said = tokenizer("Paris.", add_special_tokens=False)["input_ids"]
    for token, kwargs in (
        ("<|im_end|>", {}),
        ("</s>", {}),
        ("<|eom_id|>", {"generate_kwargs": {"stop_token_ids": [tokenizer.convert_tokens_to_ids("<|eom_id|>")]}}),
    ):
        end = tokenizer.convert_tokens_to_ids(token)
        _, outs = converse(tokenizer, [[*said, end]], [None], ["The capital of France?"], **kwargs)
        assert list(outs[0]["generation"].finish_reason) == ["length"]
        assert list(outs[0]["history"].response.content[0]) == ["Paris."]


def test_an_ordinary_stop_token_stays_in_the_content() -> None:
    tokenizer = make_tokenizer("byte-level")
    said = tokenizer("Paris.", add_special_tokens=False)["input_ids"]
    _, outs = converse(tokenizer, [said], [said[-1]], ["The capital of France?"])
    assert list(outs[0]["history"].response.content[0]) == ["Paris."]
    end = tokenizers.AddedToken("<end>", special=False)
    template = CHATML.replace("<|im_end|>", "<end>")
    tokenizer = make_tokenizer("byte-level", chat_template=template, more_tokens=(end,))
    stop = tokenizer.convert_tokens_to_ids("<end>")
    _, outs = converse(tokenizer, [[*said, stop]], [stop], ["The capital of France?"])
    assert list(outs[0]["history"].response.content[0]) == ["Paris."]  # the template writes it


def test_a_stop_string_that_is_the_beginning_of_the_next_message_is_not_rendered_twice() -> None:
    tokenizer = make_tokenizer("byte-level", chat_template=PLAIN)
    said = tokenizer("Paris.\nUser:", add_special_tokens=False)["input_ids"]
    talk = [
        {"role": "user", "content": "The capital of France?"},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "Hello?"},
    ]
    known = [*canonical(tokenizer, talk[:1]), *said]
    joined = continue_tokens(known, talk, ChatRenderer(tokenizer))
    assert joined is not None
    assert joined[: len(known)] == known
    assert tokenizer.decode(joined) == tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab\n", max_size=6), st.text(alphabet="ab\n", min_size=1, max_size=3))
def test_a_trimmed_stop_string_is_the_one_that_ended_the_response(words: str, tail: str) -> None:
    """The last token completes the stop string and may reach beyond it."""
    tokenizer = make_tokenizer("byte-level")
    ids = tokenizer(words + tail, add_special_tokens=False)["input_ids"]
    text, before = tokenizer.decode(ids), tokenizer.decode(ids[:-1])
    for stop in {tail, tail[:1]}:
        position = next((i for i in range(len(text)) if text.startswith(stop, i) and i + len(stop) > len(before)), None)
        if position is None:
            continue
        kwargs = {"generate_kwargs": {"max_new_tokens": 9, "stop": [stop], "include_stop_str_in_output": False}}
        _, outs = converse(tokenizer, [ids], [stop], ["Hello?"], **kwargs)
        assert outs[0]["text"].response[0] == text[:position]


@pytest.mark.parametrize("prefix_space", ["first", "always", "never"])
def test_the_text_of_a_sentencepiece_response_has_its_space(prefix_space: Any) -> None:
    tokenizer = make_tokenizer("sentencepiece", prefix_space=prefix_space)
    prompt = "The capital of France is"
    whole = tokenizer(f"{prompt} Paris, Paris")["input_ids"]
    answer = whole[len(tokenizer(prompt)["input_ids"]) :]
    pool = Scripted(len(tokenizer), [answer])
    out = SGLangWrapper(pool, tokenizer=tokenizer, input_mode="text")(
        TensorDict({("text", "prompt"): prompt}, batch_size=1)
    )
    assert [*pool.requests[0][0], *answer] == whole
    assert out["text"].response[0] == " Paris, Paris"
    assert out["text"].full[0] == f"{prompt} Paris, Paris"
    assert tokenizer(out["text"].full[0])["input_ids"] == whole


def test_a_content_has_the_space_that_its_template_does_not_write() -> None:
    for template, expected in (
        (INST, "Paris"),
        (INST.replace(" {{ m.content | trim }} ", "{{ m.content }}"), " Paris"),
    ):
        tokenizer = make_tokenizer("sentencepiece", chat_template=template)
        answer = tokenizer("[/INST] Paris", add_special_tokens=False)["input_ids"][-3:]
        assert tokenizer.decode([*tokenizer("]", add_special_tokens=False)["input_ids"], *answer]).endswith(" Paris")
        answer = answer[next(i for i, t in enumerate(tokenizer.convert_ids_to_tokens(answer)) if t.startswith("▁")) :]
        _, outs = converse(tokenizer, [[*answer, tokenizer.eos_token_id]], [tokenizer.eos_token_id], ["Where?"])
        assert list(outs[0]["history"].response.content[0]) == [expected]
