"""``SGLangChat``: a conversation with a served model."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchrl_sglang.chat.asyncio_threads import call_in_thread, iterate_in_thread
from torchrl_sglang.chat.defaults import GenerationDefaults
from torchrl_sglang.chat.messages import read_conversation
from torchrl_sglang.chat.response import Response, ToolCall
from torchrl_sglang.chat.template import ChatTemplate
from torchrl_sglang.chat.text_deltas import TextDeltas
from torchrl_sglang.chat.tool_calls import find_tool_calls, read_tools
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import ClientConfig, SamplingParams
from torchrl_sglang.errors import ConfigError, ProtocolError, RequestRejectedError, ServerError, ServerUnreachableError
from torchrl_sglang.model_files import load_tokenizer, read_model_json
from torchrl_sglang.pool import Servers, resolve_pool
from torchrl_sglang.protocol.generate import build_generate, parse_one
from torchrl_sglang.protocol.media import Media
from torchrl_sglang.protocol.messages import GenerateReply
from torchrl_sglang.protocol.tool_calls import build_parse_tool_calls, parse_tool_calls_answer

__all__ = ["SGLangChat"]

Messages = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turn:
    """One call, ready to be sent."""

    ids_T: list[int]
    media: Media
    tools: list[dict[str, Any]]
    sampling: SamplingParams
    adapter: str | None
    return_log_probs: bool


class SGLangChat:
    """A chat with the model that SGLang servers serve: messages in, responses out.

    Every call has four forms: :meth:`chat` and :meth:`iter_chat` block, :meth:`achat` and :meth:`stream_chat` are for
    ``async`` programs; ``iter_chat`` and ``stream_chat`` give the text in pieces while it is written. A chat holds no
    history: go on with ``[*messages, response.message, {"role": "user", ...}]``.

    Images, videos and sounds travel with the request. Tried on a real server: images (on SGLang's CPU engine, with a
    model of LLaVA's first form). Videos and sounds are tested as requests only, since the CPU engine serves no model
    that takes them.

    Args:
        servers: an engine, a pool, or the URL of a server, or several.
        tokenizer: the served model's tokenizer; by default loaded from where the server has it.
        processor: the served model's processor, for models whose chat template is in it.
        adapter: name of the LoRA adapter to use by default.
        tool_call_parser: how the model writes tool calls, by SGLang's name (``"qwen25"``, ``"llama3"``,
            ``"mistral"``...): the server's own parser then reads them. ``None`` knows the common ways, see
            :func:`~torchrl_sglang.chat.tool_calls.find_tool_calls`.
        client: time-outs and keys, when ``servers`` is an URL.
        **generation: defaults for every call: ``temperature``, ``top_p``, ``top_k``, ``num_return_sequences``,
            ``repetition_penalty``, ``skip_special_tokens``, ``max_length`` (prompt and response), ``max_new_tokens``,
            ``seed``, ``stop`` and whatever else :meth:`SamplingParams.from_kwargs` knows. What is set neither here nor
            in the call is the checkpoint's own (``generation_config.json``), then SGLang's; a response may fill the
            context. Responses end at the tokens that end a turn in the chat template.

    Raises:
        ConfigError: an unknown or bad setting, or a model that is no chat model.
        ServerError: a server can't be reached.

    Examples:
        >>> chat = SGLangChat("http://127.0.0.1:30000", temperature=0.7)  # doctest: +SKIP
        >>> chat.chat("What is the capital of France?")[0].text  # doctest: +SKIP
        'The capital of France is Paris.'
    """

    def __init__(
        self,
        servers: Servers,
        tokenizer: Any = None,
        processor: Any = None,
        *,
        adapter: str | None = None,
        tool_call_parser: str | None = None,
        client: ClientConfig | None = None,
        **generation: Any,
    ) -> None:
        self.pool = resolve_pool(servers, client)
        self.pool.connect()
        tokenizer = tokenizer or getattr(processor, "tokenizer", None)
        self.tokenizer = tokenizer or load_tokenizer(self.pool.info.tokenizer_path)
        self.adapter = adapter
        self._tool_call_parser = tool_call_parser
        self._template = ChatTemplate(self.tokenizer, processor)
        checkpoint = read_model_json(self.pool.info.model_path, "generation_config.json")
        self._defaults = GenerationDefaults(
            given=generation,
            checkpoint=checkpoint,
            stop_ids=_stop_ids(self._template.turn_end_ids(), checkpoint, self.pool.vocab_size),
        )
        self._defaults.sampling({}, prompt_length=0, context_length=None)  # a bad default is found here and now
        self._next = itertools.count()

    # ------------------------------------------------------------------ whole responses

    def chat(
        self,
        messages: Messages,
        system: str | None = None,
        tools: str | Sequence[Any] | None = None,
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
        audios: Sequence[Any] | None = None,
        *,
        adapter: str | None = None,
        return_log_probs: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
        **generation: Any,
    ) -> list[Response]:
        """Answer a conversation.

        Args:
            messages: the conversation as ``{"role": ..., "content": ...}``, or one user message's text; the content is
                a string or a list of parts (see :func:`~torchrl_sglang.chat.messages.read_conversation`).
            system: a system message, to go first.
            tools: what the model may call: JSON schemas, Python functions, or the JSON of a list of schemas.
            images: images that the messages mention, in order; unmentioned ones go before the last user message.
                Paths, bytes, URLs, ``PIL`` images, arrays, tensors: :func:`~torchrl_sglang.chat.data_urls.media_url`.
            videos: likewise.
            audios: likewise.
            adapter: name of a loaded LoRA adapter instead of the chat's own.
            return_log_probs: report the log-prob of every response token.
            template_kwargs: variables of the chat template, e.g. ``{"enable_thinking": False}``.
            timeout_s: seconds to wait instead of ``ClientConfig.generate_timeout_s``.
            **generation: settings of this call, over the chat's own.

        Returns:
            ``num_return_sequences`` responses.

        Raises:
            ConfigError: what is asked for can't be honoured; nothing was sent.
            ServerError: see :meth:`SGLangPool.generate`.
        """
        turn = self._prepare(
            read_conversation(messages, system=system, images=images, videos=videos, audios=audios),
            tools=tools,
            adapter=adapter,
            return_log_probs=return_log_probs,
            template_kwargs=template_kwargs,
            generation=generation,
        )
        replies = self.pool.generate(
            [turn.ids_T],
            turn.sampling,
            return_logprobs=turn.return_log_probs,
            timeout_s=timeout_s,
            lora=turn.adapter,
            media=[turn.media] if turn.media else None,
        )
        return [self._response(turn, reply) for reply in replies]

    async def achat(self, messages: Messages, *args: Any, **kwargs: Any) -> list[Response]:
        """:meth:`chat` for ``async`` programs. Cancelling it stops the waiting, not the server's work."""
        return await call_in_thread(lambda: self.chat(messages, *args, **kwargs))

    # ------------------------------------------------------------------ text in pieces

    def iter_chat(
        self,
        messages: Messages,
        system: str | None = None,
        tools: str | Sequence[Any] | None = None,
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
        audios: Sequence[Any] | None = None,
        *,
        adapter: str | None = None,
        return_log_probs: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
        on_finish: Callable[[Response], None] | None = None,
        **generation: Any,
    ) -> Generator[str, None, None]:
        """Answer a conversation piece by piece. The pieces together are the text that :meth:`chat` would give.

        Closing the generator ends the request on the server. With ``stop_regex`` everything comes as one piece, since
        nothing is settled before the end.

        Args:
            messages: as in :meth:`chat`, and so are the other arguments.
            system: a system message, to go first.
            tools: what the model may call.
            images: images that the messages mention.
            videos: likewise.
            audios: likewise.
            adapter: name of a loaded LoRA adapter.
            return_log_probs: report log-probs in the response that ``on_finish`` gets.
            template_kwargs: variables of the chat template.
            timeout_s: seconds between two pieces.
            on_finish: called with the whole response after the last piece.
            **generation: settings of this call; one response only.

        Yields:
            Pieces of text, none of them empty.

        Raises:
            ConfigError: what is asked for can't be honoured; nothing was sent.
            ServerError: a server failed, also in the middle.
        """
        turn = self._prepare(
            read_conversation(messages, system=system, images=images, videos=videos, audios=audios),
            tools=tools,
            adapter=adapter,
            return_log_probs=return_log_probs,
            template_kwargs=template_kwargs,
            generation=generation,
        )
        if turn.sampling.n != 1:
            raise ConfigError(f"text in pieces is for one response, but {turn.sampling.n} are asked for: use chat()")
        return self._stream(turn, timeout_s, on_finish)

    async def stream_chat(self, messages: Messages, *args: Any, **kwargs: Any) -> AsyncGenerator[str, None]:
        """:meth:`iter_chat` for ``async`` programs: an ``async`` generator of pieces of text.

        Leaving the loop early ends the request on the server when its next piece arrives; to have that at once and
        for certain, iterate inside ``contextlib.aclosing(...)``.
        """
        async for piece in iterate_in_thread(lambda: self.iter_chat(messages, *args, **kwargs)):
            yield piece

    def _stream(
        self, turn: _Turn, timeout_s: float | None, on_finish: Callable[[Response], None] | None
    ) -> Generator[str, None, None]:
        deltas = TextDeltas(turn.sampling.stop)
        reply = None
        for reply in self._replies(turn, timeout_s):
            piece = "" if turn.sampling.stop_regex or not reply.text else deltas.push(reply.text)
            if piece:
                yield piece
        assert reply is not None
        rest = deltas.finish(reply.text)
        if rest:
            yield rest
        if on_finish is not None:
            on_finish(self._response(turn, reply))

    def _replies(self, turn: _Turn, timeout_s: float | None) -> Generator[GenerateReply, None, None]:
        """The reply as it grows, from the first server that is there; a stream that has begun is not begun again."""
        self.pool.check([turn.ids_T], turn.sampling)
        lora, labelled = self.pool.resolve_adapter(turn.adapter)
        request = build_generate(
            [turn.ids_T],
            turn.sampling,
            return_logprobs=turn.return_log_probs,
            stream=True,
            lora=lora,
            cache_salt=self.pool.cache_salt,
            media=[turn.media] if turn.media else None,
        )
        while True:
            client = self._pick()
            finished = False
            try:
                for event in client.stream(request, timeout_s=timeout_s):
                    if "meta_info" not in event:
                        detail = str(event.get("error", event))
                        raise RequestRejectedError(
                            f"{client.url} stopped the stream: {detail}", server=client.url, status=200, detail=detail
                        )
                    finished = event["meta_info"].get("finish_reason") is not None
                    yield labelled(parse_one(event, server=client.url, return_logprobs=turn.return_log_probs))
            except ServerUnreachableError as error:
                self.pool.note_death(client.url, error)
                if not self.pool.healthy:
                    raise
                continue
            if not finished:
                raise ProtocolError(f"{client.url} ended a stream without a finished response", server=client.url)
            return

    def _pick(self) -> SGLangClient:
        self.pool.look_for_the_dead()
        clients = self.pool.healthy
        if not clients:
            raise ServerError(f"no server is left to answer: {dict(self.pool.quarantined)}")
        return clients[next(self._next) % len(clients)]

    # ------------------------------------------------------------------ before and after

    def _prepare(
        self,
        conversation: Any,
        *,
        tools: str | Sequence[Any] | None,
        adapter: str | None,
        return_log_probs: bool,
        template_kwargs: Mapping[str, Any] | None,
        generation: Mapping[str, Any],
    ) -> _Turn:
        schemas = read_tools(tools) if tools else []
        ids_T = self._template.encode(conversation, schemas, template_kwargs)
        sampling = self._defaults.sampling(
            generation, prompt_length=len(ids_T), context_length=self.pool.context_length
        )
        adapter = adapter if adapter is not None else self.adapter
        info = self.pool.info
        if adapter is not None and not info.lora_enabled:
            raise ConfigError(f"adapter={adapter!r}: {info.url} was launched without --enable-lora")
        if sampling.sampling_seed is not None and not info.raw.get("enable_deterministic_inference"):
            raise ConfigError(
                f"seed={sampling.sampling_seed}: {info.url} would ignore it; SGLang honours a seed under "
                "--enable-deterministic-inference only (temperature=0 is repeatable without)"
            )
        return _Turn(
            ids_T=ids_T,
            media=conversation.media,
            tools=schemas,
            sampling=sampling,
            adapter=adapter,
            return_log_probs=return_log_probs,
        )

    def _response(self, turn: _Turn, reply: GenerateReply) -> Response:
        content, calls = self._tool_calls(turn, reply) if turn.tools else (reply.text, ())
        return Response(
            text=reply.text,
            content=content if calls else reply.text,
            tool_calls=calls,
            prompt_length=reply.prompt_tokens,
            response_length=reply.completion_tokens,
            finish_reason=reply.finish_reason,
            token_ids=tuple(reply.output_ids),
            log_probs=None if reply.output_logprobs is None else tuple(reply.output_logprobs),
            weight_version=reply.weight_version,
        )

    def _tool_calls(self, turn: _Turn, reply: GenerateReply) -> tuple[str, tuple[ToolCall, ...]]:
        # The marks of a call are special tokens in many models, which the server leaves out of the text.
        ids_T = reply.output_ids[:-1] if isinstance(reply.matched, int) else reply.output_ids
        text = self.tokenizer.decode(ids_T, skip_special_tokens=False)
        if self._tool_call_parser is None:
            return find_tool_calls(text, [tool["function"]["name"] for tool in turn.tools])
        client = self._pick()
        answer = client.send(build_parse_tool_calls(text, turn.tools, self._tool_call_parser))
        content, calls = parse_tool_calls_answer(answer, server=client.url)
        return content, tuple(ToolCall(name=name, arguments=arguments) for name, arguments in calls)


def _stop_ids(template: Sequence[int], checkpoint: Mapping[str, Any], vocab_size: int | None) -> tuple[int, ...]:
    eos = checkpoint.get("eos_token_id")
    listed = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return tuple(dict.fromkeys(i for i in (*template, *listed) if vocab_size is None or i < vocab_size))
