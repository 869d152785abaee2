"""``SGLangChat``: chats with a served model, with whole or streamed responses."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torchrl_sglang.chat.asyncio_threads import call_in_thread, iterate_in_thread
from torchrl_sglang.chat.defaults import GenerationDefaults
from torchrl_sglang.chat.media_files import check_roots
from torchrl_sglang.chat.messages import read_conversation
from torchrl_sglang.chat.response import Response
from torchrl_sglang.chat.template import ChatTemplate
from torchrl_sglang.chat.text_deltas import TextDeltas
from torchrl_sglang.chat.tool_call_reader import ToolCallReader, call_ids
from torchrl_sglang.chat.tool_parsers import parser_for, template_text
from torchrl_sglang.chat.turn import Turn, prepare_turn
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import ClientConfig
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.model_files import load_tokenizer, read_model_json
from torchrl_sglang.pool import Servers, resolve_pool
from torchrl_sglang.protocol.messages import GenerateReply

__all__ = ["SGLangChat"]

Messages = str | Sequence[Mapping[str, Any]]


class SGLangChat:
    """A chat with the model that SGLang servers serve: messages in, responses out.

    Every call has four forms: :meth:`chat` and :meth:`iter_chat` block, :meth:`achat` and :meth:`stream_chat` are for
    ``async`` programs; ``iter_chat`` and ``stream_chat`` yield the text in pieces as it is generated. A chat keeps no
    history: pass ``[*messages, response.message, {"role": "user", ...}]`` to continue.

    Images, videos and sounds are part of the request. Images are tested on a real server (SGLang's CPU engine, a model
    with LLaVA's original architecture). Videos and sounds are tested as requests only, since the CPU engine serves no
    model that takes them.

    Args:
        servers: an engine, a pool, or the URL of a server, or several.
        tokenizer: the served model's tokenizer; by default loaded from the server's ``tokenizer_path``.
        processor: the served model's processor, for models whose processor holds the chat template.
        adapter: name of the LoRA adapter to use by default.
        tool_call_parser: how the model writes tool calls, by SGLang's name (``"qwen25"``, ``"llama3"``,
            ``"mistral"``...): the server's own parser then reads them, and this package's adds what it lost. ``None``
            finds the name by the server's ``--tool-call-parser``, the chat template, the architecture or the model's
            name. ``"local"``, or a family that is not known: only the common formats are read, without the server, see
            :func:`~torchrl_sglang.chat.tool_calls.read_tool_calls`.
        media_roots: folders whose files the parts of messages may name, as paths or ``file://`` URLs. By default none:
            messages may come from a model or a dataset. Files in ``images=``, ``videos=`` and ``audios=`` may lie
            anywhere.
        client: time-outs and keys, when ``servers`` is a URL.
        **generation: defaults for every call: ``temperature``, ``top_p``, ``top_k``, ``num_return_sequences``,
            ``repetition_penalty``, ``skip_special_tokens``, ``max_length`` (prompt and response), ``max_new_tokens``,
            ``seed``, ``stop`` and all other names of :meth:`SamplingParams.from_kwargs`. A setting given neither here
            nor in the call comes from the checkpoint (``generation_config.json``), then from SGLang; a response may
            fill the context. Responses end at the tokens that end a turn in the chat template.

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
        media_roots: Sequence[str | Path] = (),
        client: ClientConfig | None = None,
        **generation: Any,
    ) -> None:
        self.pool = resolve_pool(servers, client)
        self.pool.connect()
        tokenizer = tokenizer or getattr(processor, "tokenizer", None)
        self.tokenizer = tokenizer or load_tokenizer(self.pool.info.tokenizer_path, self.pool.info.revision)
        self.adapter = adapter
        self._media_roots = check_roots(media_roots)
        self._template = ChatTemplate(self.tokenizer, processor)
        checkpoint = read_model_json(self.pool.info.model_path, "generation_config.json", self.pool.info.revision)
        self._defaults = GenerationDefaults(
            given=generation,
            checkpoint=checkpoint,
            stop_ids=_stop_ids(self._template.turn_end_ids(), checkpoint, self.pool.vocab_size),
        )
        # raises if a default is bad
        self._defaults.sampling({}, prompt_length=0, context_length=self.pool.context_length)
        self._asked = itertools.count()
        self._tool_calls = ToolCallReader(
            self.tokenizer,
            self._pick_server,
            named=tool_call_parser,
            known=parser_for(
                template=template_text(self.tokenizer) + template_text(processor),
                config=read_model_json(self.pool.info.model_path, "config.json", self.pool.info.revision),
                model=self.pool.info.model_path,
                server_flag=self.pool.info.raw.get("tool_call_parser"),
            ),
        )

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
            system: a system message, put first.
            tools: what the model may call: JSON schemas, Python functions, or the JSON of a list of schemas. Answer
                each call of ``response.tool_calls`` by a message after ``response.message``:
                ``{"role": "tool", "tool_call_id": call.id, "content": ...}``.
            images: images that the messages mention, in order; unmentioned ones are put before the last user message.
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
            ConfigError: a setting or message can't be honoured; nothing was sent.
            ServerError: see :meth:`SGLangPool.generate`.
        """
        turn = self._prepare(
            messages,
            system=system,
            images=images,
            videos=videos,
            audios=audios,
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
        """:meth:`chat` for ``async`` programs. Cancelling it ends the wait; the server finishes the request."""
        return await call_in_thread(lambda: self.chat(messages, *args, **kwargs))

    # ------------------------------------------------------------------ streamed responses

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
        """Answer a conversation piece by piece. The pieces joined are the text that :meth:`chat` would return.

        Closing the generator ends the request on the server. With ``stop_regex`` the text comes as one piece, since
        any of it may be trimmed until the response ends.

        Args:
            messages: as in :meth:`chat`, and so are the other arguments.
            system: a system message, put first.
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
            ConfigError: a setting or message can't be honoured; nothing was sent.
            ServerError: a server failed, also in the middle.
        """
        turn = self._prepare(
            messages,
            system=system,
            images=images,
            videos=videos,
            audios=audios,
            tools=tools,
            adapter=adapter,
            return_log_probs=return_log_probs,
            template_kwargs=template_kwargs,
            generation=generation,
        )
        if turn.sampling.n != 1:
            raise ConfigError(f"streaming is for one response, but num_return_sequences={turn.sampling.n}: use chat()")
        return self._stream(turn, timeout_s, on_finish)

    async def stream_chat(self, messages: Messages, *args: Any, **kwargs: Any) -> AsyncGenerator[str, None]:
        """:meth:`iter_chat` for ``async`` programs: an ``async`` generator of pieces of text.

        Leaving the loop early ends the request on the server when its next piece arrives. Iterate inside
        ``contextlib.aclosing(...)`` to be sure that the generator is closed as soon as the loop is left.
        """
        async for piece in iterate_in_thread(lambda: self.iter_chat(messages, *args, **kwargs)):
            yield piece

    def _stream(
        self, turn: Turn, timeout_s: float | None, on_finish: Callable[[Response], None] | None
    ) -> Generator[str, None, None]:
        deltas = TextDeltas(turn.sampling.stop)
        reply = None
        replies = self.pool.stream(
            turn.ids_T,
            turn.sampling,
            return_logprobs=turn.return_log_probs,
            timeout_s=timeout_s,
            lora=turn.adapter,
            media=turn.media or None,
        )
        for reply in replies:
            piece = "" if turn.sampling.stop_regex or not reply.text else deltas.push(reply.text)
            if piece:
                yield piece
        assert reply is not None
        rest = deltas.finish(reply.text)
        if rest:
            yield rest
        if on_finish is not None:
            on_finish(self._response(turn, reply))

    # ------------------------------------------------------------------ requests and responses

    def _prepare(
        self,
        messages: Messages,
        *,
        system: str | None,
        images: Sequence[Any] | None,
        videos: Sequence[Any] | None,
        audios: Sequence[Any] | None,
        adapter: str | None,
        **call: Any,
    ) -> Turn:
        conversation = read_conversation(
            messages, system=system, images=images, videos=videos, audios=audios, media_roots=self._media_roots
        )
        adapter = adapter if adapter is not None else self.adapter
        return prepare_turn(conversation, self.pool, self._template, self._defaults, adapter=adapter, **call)

    def _pick_server(self) -> SGLangClient:
        """The server whose parser reads the next response: they take turns."""
        self.pool.poll_dead_servers()
        clients = self.pool.require_healthy("tool calls can't be read")
        return clients[next(self._asked) % len(clients)]

    def _response(self, turn: Turn, reply: GenerateReply) -> Response:
        found = self._tool_calls.read(turn.ids_T, reply, turn.tools) if turn.tools else None
        calls = found.calls if found is not None else ()
        return Response(
            text=reply.text,
            content=found.content if found is not None and calls else reply.text,
            tool_calls=call_ids(
                calls,
                parser=self._tool_calls.parser,
                ids_T=turn.ids_T,
                output_ids=reply.output_ids,
                earlier_calls=turn.num_earlier_calls,
            ),
            rejected_calls=found.rejected if found is not None else (),
            prompt_length=reply.prompt_tokens,
            response_length=reply.completion_tokens,
            finish_reason=reply.finish_reason,
            token_ids=tuple(reply.output_ids),
            log_probs=None if reply.output_logprobs is None else tuple(reply.output_logprobs),
            weight_version=reply.weight_version,
        )


def _stop_ids(template: Sequence[int], checkpoint: Mapping[str, Any], vocab_size: int | None) -> tuple[int, ...]:
    eos = checkpoint.get("eos_token_id")
    listed = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return tuple(dict.fromkeys(i for i in (*template, *listed) if vocab_size is None or i < vocab_size))
