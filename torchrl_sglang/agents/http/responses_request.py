"""``/responses``: the body of a request of OpenAI's Responses API as what the session is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchrl_sglang.agents.http.api_errors import bad_request
from torchrl_sglang.agents.http.chat_messages import check_messages, check_tools, read_tool_choice
from torchrl_sglang.agents.http.chat_request import WITHOUT_EFFECT, Call, Sending
from torchrl_sglang.agents.http.fields import Fields
from torchrl_sglang.agents.http.sampling_fields import MOST_TOP_LOGPROBS, read_grammar, read_sampling
from torchrl_sglang.agents.types import ChatRequest

__all__ = ["read_input", "read_responses"]

_LOG_PROBS = "message.output_text.logprobs"


def read_responses(body: Any, sending: Sending, earlier: Sequence[Mapping[str, Any]] = ()) -> Call:
    """The body of ``/responses``.

    Args:
        body: the parsed JSON.
        sending: how it was sent.
        earlier: the messages of ``previous_response_id``, its answer included.

    Raises:
        ApiError: a field that is wrong, unknown, or can't be honoured; ``param`` names it.
    """
    fields = Fields(body)
    fields.ignore(*WITHOUT_EFFECT, "stream_options", "include", "previous_response_id")
    model = fields.required_text("model")
    instructions = fields.text("instructions")
    messages = [*earlier, *read_input(fields.any("input"))]
    if instructions is not None:
        messages = [{"role": "system", "content": instructions}, *messages]
    tools = check_tools([_tool(tool, index) for index, tool in enumerate(fields.list("tools") or ())])
    choice = _tool_choice(fields.any("tool_choice"))
    choice = read_tool_choice(choice, [tool["function"]["name"] for tool in tools])
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
            tools=tools,
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


def _tool(tool: Any, index: int) -> dict[str, Any]:
    """A tool in the chat's form, which has an object ``function``."""
    fields = Fields(tool, f"tools[{index}]")
    kind = fields.required_text("type")
    if kind != "function":
        raise bad_request(
            f"tools[{index}].type={kind!r}: only functions are supported; the client runs them",
            f"tools[{index}].type",
            "unsupported_parameter",
        )
    return {"type": "function", "function": {name: value for name, value in dict(tool).items() if name != "type"}}


def _tool_choice(choice: Any) -> Any:
    """The choice of a tool in the chat's form."""
    if not isinstance(choice, Mapping):
        return choice
    if choice.get("type") == "function" and "function" not in choice:
        return {"type": "function", "function": {"name": choice.get("name")}}
    if choice.get("type") == "allowed_tools" and "allowed_tools" not in choice:
        tools = Fields(choice, "tool_choice").list("tools") or []
        tools = [{"type": "function", "function": Fields(each, "tool_choice.tools").all()} for each in tools]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": tools}}
    return choice


def read_input(value: Any) -> list[dict[str, Any]]:
    """``input`` as messages in the chat's form.

    The items of one answer (reasoning, text, calls) become one message, as they were one turn of the model.

    Raises:
        ApiError: an item of an unknown form.

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
        message = _read_item(Fields(item, f"input[{index}]"))
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


def _read_item(fields: Fields) -> dict[str, Any]:
    kind = fields.text("type") or "message"
    if kind == "message":
        role = fields.required_text("role")
        content = fields.any("content")
        if isinstance(content, list):
            content = [_read_part(Fields(part, f"{fields.path('content')}[{i}]")) for i, part in enumerate(content)]
        return {"role": role, "content": content}
    if kind == "function_call":
        function = {"name": fields.required_text("name"), "arguments": fields.text("arguments") or "{}"}
        call = {"id": fields.required_text("call_id"), "type": "function", "function": function}
        return {"role": "assistant", "tool_calls": [call]}
    if kind == "function_call_output":
        output = fields.any("output")
        if isinstance(output, list):
            output = [_read_part(Fields(part, f"{fields.path('output')}[{i}]")) for i, part in enumerate(output)]
        elif not isinstance(output, str):
            raise bad_request(f"{fields.path('output')} must be a string or a list of parts", fields.path("output"))
        return {"role": "tool", "tool_call_id": fields.required_text("call_id"), "content": output}
    if kind == "reasoning":
        parts = fields.list("content") or []
        text = "".join(Fields(part, fields.path("content")).text("text") or "" for part in parts)
        return {"role": "assistant", "reasoning_content": text} if text else {"role": "assistant"}
    raise bad_request(
        f"{fields.path('type')}={kind!r}: known items are message, function_call, function_call_output and reasoning",
        fields.path("type"),
        "unsupported_parameter",
    )


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
