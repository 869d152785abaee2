"""The served model as all sessions of a gateway use it: template, servers, sampling settings, and its tool calls."""

from __future__ import annotations

import copy
import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from torchrl_sglang.agents.conversation.answers import find_calls
from torchrl_sglang.agents.conversation.kept import Kept, value_key
from torchrl_sglang.agents.conversation.template import AgentTemplate
from torchrl_sglang.agents.generation import Generator
from torchrl_sglang.agents.image_inputs import ImageInputs
from torchrl_sglang.agents.settings import SessionSettings
from torchrl_sglang.agents.tool_choice import constrain
from torchrl_sglang.chat.defaults import GenerationDefaults
from torchrl_sglang.chat.tool_call_reader import LOCAL, asked_calls, more_faithful
from torchrl_sglang.chat.tool_calls import FoundCalls
from torchrl_sglang.chat.tool_parsers import NEVER_ASKED, READ_HERE_TOO, parser_for, template_text
from torchrl_sglang.chat_templates import check_template_kwargs
from torchrl_sglang.config import SamplingParams
from torchrl_sglang.errors import ConfigError, ContextLengthError, ProtocolError, ServerError
from torchrl_sglang.model_files import load_tokenizer, read_model_json
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.tool_calls import build_parse_tool_calls

__all__ = ["ServedModel"]

_PARSE_TIMEOUT_S = 60.0
_KEPT_SETTINGS = 64
_KEPT_BYTES = 4 * 2**20


class ServedModel:
    """One model, its servers and the settings of all sessions. Belongs to one event loop.

    Args:
        pool: the servers, which are connected if they are not yet.
        tokenizer: the model's tokenizer; by default loaded from the server's ``tokenizer_path``.
        settings: settings of all sessions.

    Raises:
        ConfigError: a bad setting, or a model without a chat template.
        ServerError: a server can't be reached.
    """

    def __init__(self, pool: SGLangPool, tokenizer: Any = None, settings: SessionSettings | None = None) -> None:
        pool.connect()
        self.pool = pool
        self.settings = settings or SessionSettings()
        info = pool.info
        if info.skips_tokenizer:
            raise ConfigError(
                f"{info.url} was launched with --skip-tokenizer-init: it can't stop at strings, as agents ask it to. "
                "Launch it without"
            )
        if self.settings.adapter is not None and not info.lora_enabled:
            raise ConfigError(f"adapter={self.settings.adapter!r}: {info.url} was launched without --enable-lora")
        self.tokenizer = tokenizer or load_tokenizer(info.tokenizer_path, info.revision)
        self.template = AgentTemplate(self.tokenizer, chat_template=self.settings.chat_template)
        self.generator = Generator(
            pool,
            max_in_flight=self.settings.max_in_flight,
            max_waiting=self.settings.max_waiting,
            no_server_wait_s=self.settings.no_server_wait_s,
            adapter=self.settings.adapter,
        )
        vocab_size = pool.vocab_size
        stops = (token for token in self.template.turn_end_ids if vocab_size is None or token < vocab_size)
        self._defaults = GenerationDefaults(given=self.settings.generation, checkpoint={}, stop_ids=tuple(stops))
        self._known_sampling: dict[str, SamplingParams] = {}
        self._constrained: Kept[bytes, SamplingParams] = Kept(_KEPT_BYTES)
        # raises if one is bad
        self._defaults.sampling(self.settings.sampling_overrides, prompt_length=0, context_length=pool.context_length)
        config = read_model_json(info.model_path, "config.json", info.revision)
        self.images = ImageInputs(lambda *args, **kwargs: self.generator.ask(*args, **kwargs), config)
        known = parser_for(
            template=self.settings.chat_template or template_text(self.tokenizer),
            config=config,
            model=info.model_path,
            server_flag=info.raw.get("tool_call_parser"),
        )
        named = self.settings.tool_call_parser
        family = None if named == LOCAL else named or known
        # A template without tools gets them in the system message, which asks for this form.
        self.family = family if self.template.knows_tools or named else "hermes"
        # A model whose template writes calls may write them so all the same.
        self.parser = family if self.template.knows_calls and family is not None else self.family

    @property
    def reads_calls_here(self) -> bool:
        """Whether calls are read without asking a server."""
        return self.parser is None or self.parser in NEVER_ASKED or self.parser in READ_HERE_TOO

    @property
    def weight_version(self) -> int:
        """The newest weights on the servers, as far as is known: sent by this process, or seen on them or in answers.

        Those of a trainer that has begun anew may have a lower number than what the servers held at first.
        """
        return self.pool.state.weights.newest_seen.number or self.pool.weight_version

    async def close(self) -> None:
        """Close all connections of this event loop. The pool stays open."""
        await self.generator.close()

    def sampling(self, given: Mapping[str, Any], prompt_length: int) -> SamplingParams:
        """The settings of a request over those of all requests.

        Raises:
            ConfigError: an unknown name or a bad value.
        """
        given = {**given, **self.settings.sampling_overrides}
        context = self.pool.context_length
        key = json.dumps(given, sort_keys=True, default=repr)
        # The checks take longer than all else that a short turn needs, and an agent's requests have the same settings.
        if key not in self._known_sampling:
            if len(self._known_sampling) >= _KEPT_SETTINGS:
                self._known_sampling.clear()
            made = self._defaults.sampling(given, prompt_length=prompt_length, context_length=context)
            self._known_sampling[key] = made.for_vocabulary(self.pool.vocab_size)
        known = self._known_sampling[key]
        length = self._defaults.max_new_tokens(given, prompt_length, context)
        return _with_length(known, length)

    def constrained(
        self,
        given: Mapping[str, Any],
        prompt_length: int,
        *,
        tools: Sequence[Mapping[str, Any]],
        tool_choice: str | Mapping[str, Any],
        parallel: bool,
        thinking_end: str | None,
    ) -> SamplingParams:
        """The settings of a request that may call tools; arguments and errors are those of :func:`constrain`."""
        plain = self.sampling(given, prompt_length)
        # Tools come with each turn, and to make a grammar of them takes longer than all else.
        key = value_key([given, tools, tool_choice, parallel, thinking_end])
        known = self._constrained.get(key)
        if known is None:
            known = constrain(
                plain,
                tools=tools,
                tool_choice=tool_choice,
                parallel=parallel,
                family=self.family,
                thinking_end=thinking_end,
            )
            self._constrained.put(key, known, size=len(key))
        return _with_length(known, plain.max_new_tokens)

    def template_variables(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Variables of the chat template: a request's go before those of the settings.

        Raises:
            ConfigError: a name that is the template's own.
        """
        asked = dict(check_template_kwargs(given))
        if self.settings.leaves_out_effort:
            asked.pop("reasoning_effort", None)
        return {**self.settings.template_kwargs, **asked}

    def close_departed(self) -> None:
        """Close the connections to servers that have left the pool."""
        self.generator.close_departed()

    def check(
        self,
        ids_P: Sequence[int],
        sampling: SamplingParams,
        *,
        num_tokens: int | None = None,
        new: Sequence[int] = (),
    ) -> None:
        """Refuse a prompt or settings that the servers can't serve.

        Args:
            ids_P: the prompt as it is sent.
            sampling: the settings.
            num_tokens: its length where images take more than one token each.
            new: the end of the prompt, if the tokens before it have been sent before.

        Raises:
            ContextLengthError: prompt and response don't fit into the context.
            ConfigError: another reason.
        """
        longest, context, vocab_size = self.pool.max_prompt_tokens, self.pool.context_length, self.pool.vocab_size
        limit = min((length for length in (longest, context) if length is not None), default=None)
        length = len(ids_P) if num_tokens is None else num_tokens
        if limit is not None and length > limit:
            raise ContextLengthError(
                f"the conversation has {length} tokens, and the servers take prompts of at most {limit}: shorten "
                "it, or launch the servers with a larger context_length",
                prompt_tokens=length,
                limit=limit,
            )
        if context is not None and length + sampling.max_new_tokens > context:
            raise ContextLengthError(
                f"the conversation has {length} tokens, and a response of up to {sampling.max_new_tokens} is asked "
                f"for: together more than the context of {context}. Shorten the conversation, or ask for fewer tokens",
                prompt_tokens=length,
                response_tokens=sampling.max_new_tokens,
                limit=context,
            )
        unchecked = new or ids_P
        if isinstance(unchecked, array) and unchecked and vocab_size is not None:
            values = np.frombuffer(unchecked, dtype=np.int64)
            if values.min() >= 0 and values.max() < vocab_size:
                unchecked = unchecked[:1]
        self.pool.check([unchecked], sampling)

    async def find_calls(
        self, text: str, tools: Sequence[Mapping[str, Any]], *, prompt_text: str, is_cut: bool
    ) -> FoundCalls:
        """The calls of an answer: read here where the format is known, else by the server's parser."""
        own = find_calls(text, tools, prompt_text=prompt_text, is_cut=is_cut)
        parser = self.parser
        if parser is None or self.reads_calls_here or not own.answer.strip():
            return own
        try:
            answer = await self.generator.ask(
                build_parse_tool_calls(own.answer, tools, parser), timeout_s=_PARSE_TIMEOUT_S
            )
            asked = asked_calls(own, answer, tools, server=self.pool.info.url)
        except (ServerError, ProtocolError):
            if self.settings.tool_call_parser is not None:
                raise
            return own
        return more_faithful(own, asked, parser)


def _with_length(sampling: SamplingParams, length: int) -> SamplingParams:
    """The settings for an answer of at most so many tokens. All others are checked already, which takes a while."""
    if sampling.max_new_tokens == length:
        return sampling
    if length < max(1, sampling.min_new_tokens):
        return replace(sampling, max_new_tokens=length)  # says what is wrong with it
    made = copy.copy(sampling)
    object.__setattr__(made, "max_new_tokens", length)
    return made
