"""What a token of a stream and a turn of a conversation cost does not grow with what was before."""

from __future__ import annotations

from typing import Any

import pytest

from tests.agent_kit import Sampled, chat, run, says, scripted, user
from tests.matrix.tokenizer_kinds import make_tokenizer
from tests.quick.agent_templates import QWEN3
from torchrl_sglang.agents.conversation import segment_ids
from torchrl_sglang.agents.conversation.progress import ProgressText
from torchrl_sglang.agents.conversation.template import AgentTemplate
from torchrl_sglang.agents.generated import Generated
from torchrl_sglang.agents.http.chat_messages import check_messages
from torchrl_sglang.agents.http.chat_request import Sending, read_chat
from torchrl_sglang.agents.http.json_body import parse_json
from torchrl_sglang.agents.turn_reports import reporter
from torchrl_sglang.agents.types import ChatRequest, Progress, TextRequest
from torchrl_sglang.protocol.stop_strings import StopStrings

THINKING = "<think>\nhm\n</think>\n\nYes."


class ReadInParts(list[Any]):
    """A list that counts how many of its items are read, and is never read whole."""

    read = 0

    def __iter__(self) -> Any:
        raise AssertionError("all tokens so far are read again")

    def __getitem__(self, at: Any) -> Any:
        found = super().__getitem__(at)
        self.read += len(found) if isinstance(at, slice) else 1
        return found


@pytest.mark.parametrize("stops", [(), ("END", "\nObs:")])
@pytest.mark.parametrize("has_tools", [False, True])
def test_a_report_of_a_stream_reads_the_new_tokens_alone(stops: tuple[str, ...], has_tools: bool) -> None:
    template = AgentTemplate(make_tokenizer("byte-level BPE", QWEN3))
    ids = template.tokenizer("<think>\nthe dog</think> and the fox jump é犬 ", add_special_tokens=False)["input_ids"]
    text = ProgressText(template, stops=stops, has_tools=has_tools)
    reports: list[Progress] = []
    report = reporter(0, text, StopStrings(stops, (), template.decode), reports.append, template)
    so_far = Generated(output_ids=ReadInParts(), log_probs=ReadInParts(), top_log_probs=ReadInParts())
    for number in range(3000):
        so_far.output_ids.append(ids[number % len(ids)])
        so_far.log_probs.append(-0.5)
        report(so_far)
    told = Progress.joined(reports)
    assert len(told.token_ids) == len(told.log_probs) == 3000
    assert told.content.startswith("and the fox")
    assert so_far.output_ids.read < 30 * 3000  # type: ignore[attr-defined]


@pytest.mark.parametrize("on_rewrite", ["branch", "keep"])
def test_a_turn_encodes_what_is_new_also_where_the_template_writes_earlier_answers_anew(
    on_rewrite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer("byte-level BPE", QWEN3)
    sessions, generator = scripted(tokenizer, lambda _: says(tokenizer, THINKING, "<|im_end|>"), on_rewrite=on_rewrite)
    session, encoded = sessions.create(), [0]
    encode = segment_ids.encode_plainly

    def counted(one: Any, text: str) -> Any:
        encoded[-1] += len(text)
        return encode(one, text)

    monkeypatch.setattr(segment_ids, "encode_plainly", counted)
    messages: list[Any] = [{"role": "system", "content": "You are a helpful agent. " * 80}]
    for number in range(30):
        encoded.append(0)
        messages.append(user(f"Look at {number}: " + "the dog and the fox " * 20))
        messages.append(dict(chat(session, messages).choices[0].message))
    assert max(encoded[2:]) < 1200, "about twice the new message, of 410 characters"
    prompt, _ = generator.calls[-1]
    expected = tokenizer.apply_chat_template(
        messages[:-1], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert on_rewrite == "keep" or list(prompt) == expected


def test_each_of_many_branches_and_texts_continues_its_own() -> None:
    tokenizer = make_tokenizer("byte-level BPE", QWEN3)
    numbers = iter(range(10_000))
    sessions, generator = scripted(tokenizer, lambda _: says(tokenizer, f"answer {next(numbers)}", "<|im_end|>"))
    session = sessions.create()
    talks = []
    for number in range(60):
        talk: list[Any] = [user("the same")] * (1 + number % 2) + [user(f"question {number}")]
        talks.append([*talk, dict(chat(session, talk).choices[0].message)])
    for talk in talks[::7]:
        turn = chat(session, [*talk, user("and?")])
        prompt, _ = generator.calls[-1]
        assert tokenizer.decode(prompt).count(talk[-1]["content"]) == 1
        assert turn.choices[0].token_ids not in {call[1] for call in generator.calls[:-1]}
    assert len(session.trajectories()) == 60
    assert session.info().turns == 60 + len(talks[::7])

    sessions, generator = scripted(tokenizer, lambda _: Sampled((5, 6), finish_reason="length"))
    session = sessions.create()
    ids = (7,)
    for _ in range(20):
        turn = run(session.complete(TextRequest(prompt=ids, sampling={"max_new_tokens": 2})))
        ids = (*ids, *turn.choices[0].token_ids, 8)
    (trajectory,) = session.trajectories()
    assert trajectory.token_ids == ids[:-1]
    assert sum(trajectory.loss_mask) == 40


def test_plain_messages_are_read_as_all_others_and_what_they_lack_is_said() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    talk = [
        {"role": "system", "content": "s"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "r", "tool_call_id": "c1"},
        {"role": "user", "content": "u"},
    ]
    wordy = [{**message, "name": None, "refusal": None} for message in talk]
    tokenizer = make_tokenizer("byte-level BPE", QWEN3)
    prompts = []
    for given in (talk, wordy):
        sessions, generator = scripted(tokenizer, lambda _: says(tokenizer, "Yes.", "<|im_end|>"))
        run(sessions.create().chat(ChatRequest(messages=check_messages(given))))
        prompts.append(generator.calls[-1][0])
    assert prompts[0] == prompts[1]
    for bad, named in (
        ({"role": "tool", "content": "x"}, "tool_call_id"),
        ({"role": "robot", "content": "x"}, "role"),
        ({"role": ["user"], "content": "x"}, "role"),
        ({"role": "user", "content": "x", "prefix": True}, "prefix"),
    ):
        with pytest.raises(Exception, match=named):
            check_messages([bad])


@pytest.mark.parametrize(
    ("written", "value"),
    [(b"1208925819614629174706176", 2**80), (b"-9223372036854775809", -(2**63) - 1), (b"1.5", 1.5), (b"7", 7)],
)
def test_numbers_are_read_as_they_are_written(written: bytes, value: float) -> None:
    read = parse_json(b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "seed": %b}' % written)
    assert (read["seed"], type(read["seed"])) == (value, type(value))
    if type(value) is int:
        call = read_chat(read, Sending())
        assert call.request.sampling["seed"] == value


def test_the_grammar_of_tools_is_made_once_and_one_for_each_order_of_their_fields() -> None:
    tokenizer = make_tokenizer("byte-level BPE", QWEN3)
    sessions, _ = scripted(tokenizer, lambda _: says(tokenizer, "Yes.", "<|im_end|>"))
    made = []
    for order in (("a", "b"), ("b", "a")):
        schema = {"type": "object", "properties": {name: {"type": "string"} for name in order}}
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        for length in (10, 20):
            made.append(
                sessions.model.constrained(
                    {"temperature": 0.5},
                    length,
                    tools=[dict(tool)],
                    tool_choice="required",
                    parallel=True,
                    thinking_end=None,
                )
            )
    assert [each.max_new_tokens for each in made] == [100_000 - 10, 100_000 - 20] * 2
    assert made[0].structural_tag == made[1].structural_tag
    assert list(made[0].to_wire()) == list(made[2].to_wire())
    assert str(made[0].structural_tag) != str(made[2].structural_tag), "fields are generated in their order"
