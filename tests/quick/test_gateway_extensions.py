"""Fields that agents' libraries send beside OpenAI's, as vLLM, SGLang and others take them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.gateway_stand_in import StandInGateway, make_choice, make_turn
from torchrl_sglang.agents.types import ChatRequest, Turn
from torchrl_sglang.errors import ContextLengthError

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.fixture
def gateway() -> StandInGateway:
    return StandInGateway()


def with_prompt(*ids: int) -> Turn:
    made = make_turn(make_choice())
    return Turn(
        id=made.id,
        choices=made.choices,
        prompt_tokens=len(ids),
        completion_tokens=2,
        cached_tokens=0,
        read_prompt_ids=lambda: list(ids),
    )


def chunks(text: str) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


# The request of verifiers' environments, trimmed.
VERIFIERS = {
    "logprobs": True,
    "max_completion_tokens": 200,
    "n": 1,
    "temperature": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "return_token_ids": True,
    "repetition_penalty": 1.0,
    "min_tokens": 0,
    "chat_template_kwargs": {"enable_thinking": False},
}


def test_token_ids_are_returned_as_verifiers_reads_them(gateway: StandInGateway) -> None:
    gateway.session.answers.append(with_prompt(5, 6, 7))
    answer = gateway.chat(**VERIFIERS).json()
    assert answer["prompt_token_ids"] == [5, 6, 7]
    (choice,) = answer["choices"]
    assert choice["token_ids"] == [72, 105]
    assert [each["token"] for each in choice["logprobs"]["content"]] == ["H", "i"]
    (request,) = gateway.session.requests
    assert isinstance(request, ChatRequest)
    assert request.template_kwargs == {"enable_thinking": False}
    assert request.sampling["top_k"] == -1


def test_a_stream_has_the_token_ids_that_the_whole_answer_has(gateway: StandInGateway) -> None:
    gateway.session.answers.append(with_prompt(5, 6))
    events = chunks(gateway.chat(stream=True, return_token_ids=True).text)
    assert [i for event in events for choice in event["choices"] for i in choice.get("token_ids", ())] == [72, 105]
    assert [event["prompt_token_ids"] for event in events if "prompt_token_ids" in event] == [[5, 6]]


def test_completions_have_both_in_the_choice(gateway: StandInGateway) -> None:
    body = {"model": "m", "prompt": "Hi", "return_token_ids": True}
    for stream in (False, True):
        gateway.session.answers.append(with_prompt(5))
        answer = gateway.send("/sessions/s1/v1/completions", {**body, "stream": stream})
        events = chunks(answer.text) if stream else [answer.json()]
        choices = [choice for event in events for choice in event["choices"]]
        assert [i for choice in choices for i in choice.get("token_ids", ())] == [72, 105]
        assert [choice["prompt_token_ids"] for choice in choices if "prompt_token_ids" in choice] == [[5]]


def test_no_token_ids_unless_they_are_asked_for(gateway: StandInGateway) -> None:
    answer = gateway.chat(logprobs=True, return_token_ids=False)
    assert "token_ids" not in answer.text
    assert "prompt_token_ids" not in answer.text


def test_log_probs_name_tokens_by_their_ids_where_that_is_asked_for(gateway: StandInGateway) -> None:
    fields = {"logprobs": True, "return_tokens_as_token_ids": True}
    content = gateway.chat(**fields).json()["choices"][0]["logprobs"]["content"]
    assert [(each["token"], each["bytes"]) for each in content] == [("token_id:72", [72]), ("token_id:105", [105])]
    old = gateway.send("/sessions/s1/v1/completions", {"model": "m", "prompt": "Hi", **fields, "logprobs": 0}).json()
    assert old["choices"][0]["logprobs"]["tokens"] == ["token_id:72", "token_id:105"]


GRAMMARS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"guided_json": SCHEMA}, {"json_schema": SCHEMA}),
    ({"guided_json": json.dumps(SCHEMA)}, {"json_schema": json.dumps(SCHEMA)}),
    ({"guided_json": SCHEMA, "guided_decoding_backend": "xgrammar"}, {"json_schema": SCHEMA}),
    ({"guided_regex": "a+"}, {"regex": "a+"}),
    ({"guided_choice": ["yes", "no (1.5)"]}, {"regex": r"(yes|no \(1\.5\))"}),
    ({"guided_grammar": 'root ::= "a"'}, {"ebnf": 'root ::= "a"'}),
    ({"structured_outputs": {"json": SCHEMA}}, {"json_schema": SCHEMA}),
    ({"structured_outputs": {"choice": ["a", "b"]}}, {"regex": "(a|b)"}),
    ({"structured_outputs": {"json_object": True}}, {"json_schema": {"type": "object"}}),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, {"json_schema": SCHEMA}),
    ({"response_format": {"type": "text"}, "guided_regex": "a"}, {"regex": "a"}),
]


@pytest.mark.parametrize("path", ["/chat/completions", "/completions"])
@pytest.mark.parametrize(("fields", "grammar"), GRAMMARS)
def test_other_servers_names_of_grammars_are_honoured(
    gateway: StandInGateway, path: str, fields: dict[str, Any], grammar: dict[str, Any]
) -> None:
    least = {"model": "m", "prompt": "Hi"} if path == "/completions" else {"model": "m", "messages": [USER]}
    answer = gateway.send(f"/sessions/s1/v1{path}", {**least, **fields})
    assert answer.status_code == 200, answer.text
    sampling = gateway.session.requests[-1].sampling
    assert {name: sampling[name] for name in ("json_schema", "regex", "ebnf") if name in sampling} == grammar


USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize("name", ["include_stop_str_in_output", "no_stop_trim"])
def test_an_answer_keeps_its_stop_string_where_that_is_asked_for(gateway: StandInGateway, name: str) -> None:
    assert gateway.chat(**{name: True, "stop": ["</code>"]}).status_code == 200
    assert gateway.chat(**{name: False, "stop": ["</code>"]}).status_code == 200
    kept, trimmed = gateway.session.requests
    assert kept.sampling == {"stop": ["</code>"], "no_stop_trim": True}
    assert trimmed.sampling == {"stop": ["</code>"]}


@pytest.mark.parametrize(
    "fields",
    [
        {"request_id": "a", "rid": "b", "priority": 1, "cache_salt": "c", "session_id": "d"},
        {"provider": {"order": ["x"]}, "route": "fallback", "usage": {"include": True}, "transforms": []},
        {"spaces_between_special_tokens": False, "skip_special_tokens": True, "length_penalty": 1.0},
        {"use_beam_search": False, "early_stopping": False, "return_hidden_states": False},
        {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": False}},
        {"enable_thinking": False},
        {"stop_regex": ["a+"]},
    ],
)
def test_fields_that_change_no_token_or_are_honoured_are_taken(gateway: StandInGateway, fields: dict[str, Any]) -> None:
    assert gateway.chat(**fields).status_code == 200


def test_thinking_can_be_switched_off_by_a_field_of_the_request(gateway: StandInGateway) -> None:
    gateway.chat(enable_thinking=False)
    gateway.chat(enable_thinking=False, chat_template_kwargs={"enable_thinking": True})
    assert [request.template_kwargs["enable_thinking"] for request in gateway.session.requests] == [False, True]


@pytest.mark.parametrize("fields", [{"thinking": {"type": "disabled"}}, {"reasoning": {"enabled": False}}])
def test_thinking_that_other_servers_fields_switch_off_is_off(gateway: StandInGateway, fields: dict[str, Any]) -> None:
    assert gateway.chat(**fields).status_code == 200
    assert gateway.chat(**fields, chat_template_kwargs={"thinking": True}).status_code == 200
    off, other = (request.template_kwargs for request in gateway.session.requests)
    assert (off, other["thinking"]) == ({"enable_thinking": False, "thinking": False}, True)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"return_token_ids": "yes"}, "return_token_ids", "true or false"),
        ({"guided_json": 5}, "guided_json", "JSON schema"),
        ({"guided_choice": []}, "guided_choice", "list of texts"),
        ({"guided_choice": ["a", 5]}, "guided_choice", "list of texts"),
        ({"guided_regex": ""}, "guided_regex", "non-empty"),
        ({"structured_outputs": {"jsn": {}}}, "structured_outputs.jsn", "unknown field"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.json", "both constrain"),
        ({"guided_regex": "a", "regex": "b"}, "regex", "both constrain"),
        ({"include_stop_str_in_output": True, "no_stop_trim": False}, "no_stop_trim", "send one"),
        ({"bad_words": ["a"]}, "bad_words", "logit_bias"),
        ({"allowed_token_ids": [1]}, "allowed_token_ids", "logit_bias"),
        ({"truncate_prompt_tokens": 100}, "truncate_prompt_tokens", "shorten the conversation"),
        ({"transforms": ["middle-out"]}, "transforms", "shorten the conversation"),
        ({"prompt_logprobs": 1}, "prompt_logprobs", "SGLang server itself"),
        ({"use_beam_search": True}, "use_beam_search", "no beam search"),
        ({"extra_body": {"top_k": 5}}, "extra_body", "into the request itself"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
            "last piece",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_what_to_do(
    gateway: StandInGateway, fields: dict[str, Any], param: str, words: str
) -> None:
    answer = gateway.chat(**fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert words in answer.json()["error"]["message"]
    assert not gateway.session.requests


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ContextLengthError("it has 9", prompt_tokens=9, limit=8), "This model's maximum context length is 8 tokens: "),
        (ContextLengthError("it has 9"), "The prompt is longer than the model's maximum context length: "),
    ],
)
def test_a_prompt_that_is_too_long_is_refused_in_the_words_that_frameworks_look_for(
    gateway: StandInGateway, error: ContextLengthError, words: str
) -> None:
    gateway.session.answers.append(error)
    refusal = gateway.chat().json()["error"]
    assert refusal["code"] == "context_length_exceeded"
    assert refusal["message"] == f"{words}it has 9"


def test_the_model_list_has_the_length_of_the_context() -> None:
    gateway = StandInGateway(context_length=4096)
    (model,) = gateway.send("/sessions/s1/v1/models", method="GET").json()["data"]
    assert model["max_model_len"] == 4096


@pytest.mark.parametrize(
    "part", ["Hi", {"type": "input_text", "text": "Hi"}, {"type": "output_text", "text": "Hi", "annotations": []}]
)
def test_texts_of_other_apis_are_parts_of_a_content(gateway: StandInGateway, part: Any) -> None:
    answer = gateway.chat(messages=[{"role": "user", "content": [part, {"type": "text", "text": " there"}]}])
    assert answer.status_code == 200, answer.text
    (request,) = gateway.session.requests
    assert isinstance(request, ChatRequest)
    assert request.messages[0]["content"] == [{"type": "text", "text": "Hi"}, {"type": "text", "text": " there"}]


def test_a_web_search_is_refused_also_without_options(gateway: StandInGateway) -> None:
    answer = gateway.chat(web_search_options={})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "web_search_options")
