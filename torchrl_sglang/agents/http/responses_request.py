"""``/responses``: the body of a request of OpenAI's Responses API as what the session is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torchrl_sglang.agents.http.api_errors import ApiError, bad_request
from torchrl_sglang.agents.http.chat_messages import check_messages, check_tools, read_tool_choice
from torchrl_sglang.agents.http.chat_request import WITHOUT_EFFECT, Call, Sending
from torchrl_sglang.agents.http.fields import Fields
from torchrl_sglang.agents.http.responses_tools import ResponsesTools, chat_call, chat_result, is_call, is_result
from torchrl_sglang.agents.http.sampling_fields import MOST_TOP_LOGPROBS, read_grammar, read_sampling
from torchrl_sglang.agents.types import ChatRequest

__all__ = ["read_input", "read_responses"]

_LOG_PROBS = "message.output_text.logprobs"


def read_responses(
    body: Any,
    sending: Sending,
    earlier: Sequence[Mapping[str, Any]] = (),
    *,
    tools: ResponsesTools,
    items: Mapping[str, Any] = MappingProxyType({}),
) -> Call:
    """The body of ``/responses``.

    Args:
        body: the parsed JSON.
        sending: how it was sent.
        earlier: the messages of ``previous_response_id``, its answer included.
        tools: the request's tools.
        items: the items of earlier answers, which ``item_reference`` names.

    Raises:
        ApiError: a field that is wrong, unknown, or can't be honoured; ``param`` names it.
    """
    fields = Fields(body)
    fields.ignore(*WITHOUT_EFFECT, "stream_options", "include", "previous_response_id", "client_metadata")
    model = fields.required_text("model")
    instructions = fields.text("instructions")
    messages = [*earlier, *read_input(fields.any("input"), items)]
    if instructions is not None:
        messages = [{"role": "system", "content": instructions}, *messages]
    fields.list("tools")
    functions = check_tools(tools.functions)
    choice = tools.choice(fields.any("tool_choice"))
    choice = read_tool_choice(choice, [tool["function"]["name"] for tool in functions])
    fields.refuse("n", "the Responses API has one answer per request", neutral=(1,))
    sampling = read_sampling(fields)
    limit = fields.integer("max_output_tokens", at_least=1)
    if limit is not None:
        sampling["max_new_tokens"] = limit
    text = fields.object("text")
    if text is not None:
        sampling.update(_read_text(Fields(text, "text")))
    top = fields.integer("top_logprobs", at_least=0, at_most=MOST_TOP_LOGPROBS) or 0
    variables = dict(fields.object("chat_template_kwargs") or {})
    effort = _read_reasoning(fields)
    if effort is not None:
        variables["reasoning_effort"] = effort
    stream = bool(fields.flag("stream"))
    parallel = fields.flag("parallel_tool_calls")
    fields.refuse("truncation", "shorten the input", neutral=("disabled",))
    fields.refuse("background", "wait for the answer, or stream it", neutral=(False,))
    fields.refuse("conversation", "send the whole input, or previous_response_id")
    fields.refuse("prompt", "send the input itself")
    fields.refuse("max_tool_calls", "the tools are called by the client")
    fields.refuse_unread()
    return Call(
        request=ChatRequest(
            messages=check_messages(messages),
            tools=functions,
            tool_choice=choice,
            parallel_tool_calls=parallel,
            template_kwargs=variables,
            sampling=sampling,
            top_logprobs=top,
            idempotency_key=sending.idempotency_key,
            attempt=sending.attempt,
        ),
        model=model,
        stream=stream,
        effort=effort,
        log_probs=top > 0 or _LOG_PROBS in (fields.list("include") or ()),
    )


def _read_text(fields: Fields) -> dict[str, Any]:
    fields.refuse("verbosity", "say it in the instructions", neutral=("medium",))
    form = fields.object("format")
    fields.refuse_unread()
    return {} if form is None else read_grammar(Fields(form, "text.format"))


def _read_reasoning(fields: Fields) -> str | None:
    """``reasoning.effort``."""
    reasoning = fields.object("reasoning")
    if reasoning is None:
        return None
    inner = Fields(reasoning, "reasoning")
    inner.ignore("summary", "generate_summary")  # the reasoning itself is returned
    effort = inner.text("effort")
    inner.refuse_unread()
    return effort


def read_input(value: Any, items: Mapping[str, Any] = MappingProxyType({})) -> list[dict[str, Any]]:
    """``input`` as messages in the chat's form.

    The items of one answer (reasoning, text, calls) become one message, as they were one turn of the model.

    Args:
        value: the input.
        items: the items of earlier answers.

    Raises:
        ApiError: an item of an unknown form, or a reference to an unknown one.

    Examples:
        >>> items = [{"type": "function_call", "call_id": "c1", "name": "now", "arguments": "{}"},
        ...          {"type": "function_call_output", "call_id": "c1", "output": "12:00"}]
        >>> [message["role"] for message in read_input(items)]
        ['assistant', 'tool']
    """
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise bad_request(f"input must be a text or a list of items, got {value!r:.100}", "input")
    messages: list[dict[str, Any]] = []
    for index, item in enumerate(value):
        message = _read_item(_referred(Fields(item, f"input[{index}]"), items))
        last = messages[-1] if messages else None
        if (
            message["role"] == "assistant"
            and last is not None
            and last["role"] == "assistant"
            and _joins(last, message)
        ):
            _join(last, message)
        else:
            messages.append(message)
    return [message for message in messages if set(message) != {"role"}]


def _referred(fields: Fields, items: Mapping[str, Any]) -> Fields:
    """The fields of an item, or of the one that it refers to."""
    given = fields.all()
    if not (given.get("type") == "item_reference" or (set(given) == {"id"} and given["id"] in items)):
        return fields
    name = fields.required_text("id")
    if name not in items:
        raise ApiError(
            404,
            f"there is no item {name!r:.80} in this session: send the item itself",
            param=fields.where,
            code="item_not_found",
        )
    return Fields(items[name], fields.where)


def _read_item(fields: Fields) -> dict[str, Any]:
    kind = fields.text("type") or "message"
    if kind == "message":
        role = fields.required_text("role")
        content = fields.any("content")
        if isinstance(content, list):
            content = [_read_part(Fields(part, f"{fields.path('content')}[{i}]")) for i, part in enumerate(content)]
        return {"role": role, "content": content}
    if is_call(kind):
        return {"role": "assistant", "tool_calls": [chat_call(kind, fields)]}
    if is_result(kind):
        return chat_result(kind, fields, _output)
    if kind == "reasoning":
        parts = fields.list("content") or []
        text = "".join(Fields(part, fields.path("content")).text("text") or "" for part in parts)
        return {"role": "assistant", "reasoning_content": text} if text else {"role": "assistant"}
    raise bad_request(
        f"{fields.path('type')}={kind!r}: known items are messages, reasoning, and calls of tools that the client runs "
        "with their results",
        fields.path("type"),
        "unsupported_parameter",
    )


def _output(fields: Fields) -> str | list[dict[str, Any]]:
    output = fields.any("output")
    if isinstance(output, list):
        return [_read_part(Fields(part, f"{fields.path('output')}[{i}]")) for i, part in enumerate(output)]
    if not isinstance(output, str):
        raise bad_request(f"{fields.path('output')} must be a string or a list of parts", fields.path("output"))
    return output


def _read_part(fields: Fields) -> dict[str, Any]:
    kind = fields.text("type", choices=("input_text", "output_text", "text", "refusal", "input_image"), required=True)
    if kind == "input_image":
        return {"type": "image_url", "image_url": {"url": fields.required_text("image_url")}}
    return {"type": "text", "text": fields.required_text("refusal" if kind == "refusal" else "text")}


def _joins(last: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether an item belongs to the answer before it: an answer has one text, and begins with its reasoning."""
    if "reasoning_content" in new or set(new) == {"role"}:
        return set(last) == {"role"}
    if "content" in new:
        return "content" not in last and "tool_calls" not in last
    return True


def _join(last: dict[str, Any], new: Mapping[str, Any]) -> None:
    calls = [*last.get("tool_calls", ()), *new.get("tool_calls", ())]
    last.update(new)
    if calls:
        last["tool_calls"] = calls
        last.setdefault("content", None)
