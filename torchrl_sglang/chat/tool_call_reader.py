"""Reads the tool calls of a response: by the server's parser for the model's family, and by this package's own."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torchrl_sglang.chat.quoted_text import open_thinking
from torchrl_sglang.chat.response import ToolCall
from torchrl_sglang.chat.tool_calls import FoundCalls, fit_call, read_tool_calls
from torchrl_sglang.chat.tool_formats import WrittenCall
from torchrl_sglang.chat.tool_json import plain, read_json
from torchrl_sglang.chat.tool_parsers import NEVER_ASKED, READ_HERE_TOO
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.errors import ConfigError, ProtocolError, RequestRejectedError, ServerError
from torchrl_sglang.protocol.messages import GenerateReply
from torchrl_sglang.protocol.tool_calls import build_parse_tool_calls, parse_tool_calls_answer

__all__ = ["LOCAL", "ToolCallReader", "asked_calls", "call_ids", "more_faithful"]

LOCAL = "local"
"""Instead of the name of a parser: no server is asked."""

_OPENINGS = ("<tool_call>", "<function=", "<｜tool▁call▁begin｜>", "<｜tool▁calls▁begin｜>", "[TOOL_CALLS]")
_MANY_CALLS = 200
_TAIL = 64  # tokens of the prompt's end that can hold a thinking tag, in bytes at worst
_ALPHABET = string.ascii_letters + string.digits
_MISTRAL_ID = re.compile("[a-zA-Z0-9]{9}")
_ID_LENGTH = 9  # Mistral's templates accept no other, and all others accept any


class ToolCallReader:
    """Reads the tool calls of one model's responses.

    Args:
        tokenizer: the model's tokenizer.
        pick_server: returns the server to ask.
        named: a parser that the user has named, or :data:`LOCAL`; its errors are raised.
        known: the parser of the model's family, if it is known; a server without it is not asked again.

    Raises:
        ConfigError: the server has no parser of the given name.
    """

    def __init__(
        self, tokenizer: Any, pick_server: Callable[[], SGLangClient], *, named: str | None, known: str | None
    ) -> None:
        self._tokenizer = tokenizer
        self._pick_server = pick_server
        self._named = named
        self.family = None if named == LOCAL else named or known
        self.parser = None if self.family in NEVER_ASKED else self.family
        if self._named is not None and self.parser is not None:
            self._check(self.parser)

    def read(self, ids_T: Sequence[int], reply: GenerateReply, tools: Sequence[Mapping[str, Any]]) -> FoundCalls:
        """The calls in a reply.

        Args:
            ids_T: the prompt.
            reply: the response; its tokens are decoded again, because special tokens mark calls in many models.
            tools: the tools' JSON schemas in OpenAI's form.

        Raises:
            ServerError: the server that was asked for a named parser failed.
        """
        text = self._text(reply)
        thinks = open_thinking(self._decode(ids_T[-_TAIL:]))
        own = read_tool_calls(text, tools, thinks=thinks, is_cut=reply.finish_reason != "stop")
        if self.parser is None or not own.answer.strip() or _is_degenerate(own.answer):
            return own
        try:
            asked = self._ask(self.parser, own, tools)
        except (ServerError, ProtocolError):
            if self._named is not None:
                raise
            return own
        return more_faithful(own, asked, self.parser)

    def _text(self, reply: GenerateReply) -> str:
        """The response with its special tokens, without the token or string that ended it."""
        ids = list(reply.output_ids)
        ends_turn = isinstance(reply.matched, int) and ids and self.parser != "gpt-oss"  # <|call|> is part of a call
        text = self._decode(ids[:-1] if ends_turn else ids)
        if isinstance(reply.matched, str) and reply.matched in text:
            text = text[: text.rindex(reply.matched)]
        return text

    def _decode(self, ids_T: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids_T), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _ask(self, parser: str, own: FoundCalls, tools: Sequence[Mapping[str, Any]]) -> FoundCalls:
        """What the server's parser finds after the thinking."""
        client = self._pick_server()
        answer = own.answer
        if parser == "gpt-oss" and answer.startswith("<|channel|>"):
            answer = f"<|start|>assistant{answer}"  # the prompt has the beginning of the message
        reply = client.send(build_parse_tool_calls(answer, tools, parser))
        return asked_calls(own, reply, tools, server=client.url)

    def _check(self, parser: str) -> None:
        client = self._pick_server()
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
        try:
            client.send(build_parse_tool_calls("", [tool], parser))
        except RequestRejectedError as error:
            raise ConfigError(
                f"tool_call_parser={parser!r}: {client.url} has no such parser (it answered {error.status}). Names are "
                f"those of SGLang's --tool-call-parser, such as 'qwen25', 'llama3' or 'mistral'; {LOCAL!r} reads the "
                "common formats without a server."
            ) from error


def asked_calls(own: FoundCalls, reply: Any, tools: Sequence[Mapping[str, Any]], *, server: str) -> FoundCalls:
    """The calls that a server's parser found after the thinking.

    Args:
        own: what this package's parser found.
        reply: the server's answer.
        tools: the tools' JSON schemas in OpenAI's form.
        server: its URL, for errors.
    """
    content, raw_calls = parse_tool_calls_answer(reply, server=server)
    written = tuple(WrittenCall(name=name, arguments=_arguments(raw)) for name, raw in raw_calls)
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
    return dataclasses.replace(
        own,
        content=(own.thinking + content).strip(),
        calls=tuple(fit_call(call, schemas) for call in written),
        written=written,
    )


def _is_degenerate(answer: str) -> bool:
    """Whether a response opens so many calls that the server's parsers, whose time grows with the square, stop it."""
    return any(answer.count(mark) > _MANY_CALLS for mark in _OPENINGS)


def _arguments(raw: str) -> Mapping[str, Any]:
    try:
        value = read_json(raw or "{}")
    except ValueError:
        value = None
    return value if isinstance(value, Mapping) else {}


def more_faithful(own: FoundCalls, asked: FoundCalls, parser: str) -> FoundCalls:
    """The server's calls, unless it lost some, or took a passage whose meaning is doubtful.

    Its parsers lose calls with line breaks in strings, calls of unknown tools, and some spellings of numbers.
    """
    if own.rejected and parser in READ_HERE_TOO:
        return own
    if len(asked.calls) < len(own.calls) or _content(own.written) == _content(asked.written):
        return own
    return dataclasses.replace(asked, rejected=())


def _content(calls: Sequence[WrittenCall]) -> list[tuple[str, Any]]:
    return [(call.name, plain(dict(call.arguments))) for call in calls]


def call_ids(
    calls: Sequence[ToolCall],
    *,
    parser: str | None,
    ids_T: Sequence[int],
    output_ids: Sequence[int],
    earlier_calls: int,
) -> tuple[ToolCall, ...]:
    """The calls with ids. The same response to the same prompt has the same ids, so that runs can be repeated.

    Args:
        calls: without ids, except where the model wrote them.
        parser: the parser of the model's family.
        ids_T: the prompt.
        output_ids: the response.
        earlier_calls: number of calls in the prompt's messages; Kimi K2's ids count on.

    Examples:
        >>> call_ids([ToolCall(name="f")], parser="kimi_k2", ids_T=[1], output_ids=[2], earlier_calls=3)[0].id
        'functions.f:3'
    """
    named, written = [], [call.id for call in calls]
    for index, call in enumerate(calls):
        new = _new_id(repr((list(ids_T), list(output_ids), index)))
        if parser == "kimi_k2":
            new = f"functions.{call.name}:{earlier_calls + index}"
        keeps = call.id and written.count(call.id) == 1 and (parser != "mistral" or _MISTRAL_ID.fullmatch(call.id))
        named.append(dataclasses.replace(call, id=call.id if keeps else new))
    return tuple(named)


def _new_id(seed: str) -> str:
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest())
    letters = []
    for _ in range(_ID_LENGTH):
        number, letter = divmod(number, len(_ALPHABET))
        letters.append(_ALPHABET[letter])
    return "".join(letters)
