"""The part of the engine that generates: text or token ids in, replies out."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torchrl_sglang.config import SamplingParams
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.model_files import load_tokenizer
from torchrl_sglang.parallel import side_by_side
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.control import build_flush
from torchrl_sglang.protocol.messages import GenerateReply
from torchrl_sglang.text_tokens import encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["EngineGeneration"]


class EngineGeneration:
    """How :class:`AsyncSGLang` generates; see there."""

    def __init__(self, pool: SGLangPool) -> None:
        self.pool = pool
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The served model's tokenizer, loaded on first use.

        Raises:
            ConfigError: the server's tokenizer path can't be read from this machine.
        """
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.pool.info.tokenizer_path, self.pool.info.revision)
        return self._tokenizer

    def generate(
        self,
        prompts: str | Sequence[str] | None = None,
        sampling_params: SamplingParams | dict[str, Any] | None = None,
        *,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        return_logprobs: bool = True,
        return_text: bool = True,
        timeout_s: float | None = None,
        **sampling: Any,
    ) -> GenerateReply | list[GenerateReply]:
        """Generate from text or token ids, one or many.

        Args:
            prompts: text; encoded with the served tokenizer, whose BOS is added unless the text begins with it.
            sampling_params: how tokens are drawn.
            input_ids: token ids instead of text.
            return_logprobs: report the log-prob of every response token.
            return_text: keep the server's decoded text in the replies.
            timeout_s: seconds for the whole batch.
            **sampling: single sampling arguments instead of ``sampling_params``, under any of the names that
                :meth:`SamplingParams.from_kwargs` knows.

        Returns:
            One reply for a single prompt with ``n=1``, else a prompt-major list of ``B * n``.

        Raises:
            ConfigError: bad prompts or sampling arguments; nothing was sent.
            ServerError: see :meth:`SGLangPool.generate`.
        """
        if (prompts is None) == (input_ids is None):
            raise ConfigError("give either prompts (text) or input_ids (token ids)")
        if prompts is not None:
            texts = [prompts] if isinstance(prompts, str) else list(prompts)
            ids_B_T = encode_texts(self.tokenizer, texts, open_end=True)
            single = isinstance(prompts, str)
        else:
            assert input_ids is not None
            single = len(input_ids) > 0 and isinstance(input_ids[0], int)
            ids_B_T = [list(input_ids)] if single else [list(ids_T) for ids_T in input_ids]  # type: ignore[arg-type]
        params = _sampling(sampling_params, sampling)
        replies = self.pool.generate(ids_B_T, params, return_logprobs=return_logprobs, timeout_s=timeout_s)
        if not return_text:
            replies = [replace(reply, text="") for reply in replies]
        return replies[0] if single and params.n == 1 else replies

    def generate_batch(self, prompts: Sequence[str], **options: Any) -> list[GenerateReply]:
        """Like :meth:`generate` for a list of texts; always a list."""
        replies = self.generate(list(prompts), **options)
        return replies if isinstance(replies, list) else [replies]

    async def agenerate(self, *args: Any, **options: Any) -> GenerateReply | list[GenerateReply]:
        """Like :meth:`generate`, for code that runs in an event loop."""
        return await asyncio.to_thread(self.generate, *args, **options)

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        sampling_params: SamplingParams | dict[str, Any] | None = None,
        return_logprobs: bool = False,
        **sampling: Any,
    ) -> Iterator[GenerateReply]:
        """Generate one sequence and yield it as it grows; each reply holds all tokens so far.

        Args:
            prompt: text or token ids.
            sampling_params: how tokens are drawn; ``n`` must be 1.
            return_logprobs: report the log-prob of every response token.
            **sampling: single sampling arguments, as in :meth:`generate`.

        Raises:
            ConfigError: bad prompt or sampling arguments; nothing was sent.
            ServerError: also in the middle of the stream.
        """
        params = _sampling(sampling_params, sampling)
        if params.n != 1:
            raise ConfigError(f"a stream carries one sequence, got n={params.n}")
        ids_T = encode_texts(self.tokenizer, [prompt], open_end=True)[0] if isinstance(prompt, str) else list(prompt)
        return self.pool.stream(ids_T, params, return_logprobs=return_logprobs)

    def flush_cache(self) -> None:
        """Empty every server's prefix cache.

        Raises:
            ConfigError: GPU memory is offloaded.
            RequestRejectedError: a server has requests running.
        """
        self.pool.refuse_while_offloaded()
        calls = {client.url: partial(client.send, build_flush()) for client in self.pool.clients}
        for outcome in side_by_side(calls).values():
            outcome.unwrap()


def _sampling(given: SamplingParams | dict[str, Any] | None, single: dict[str, Any]) -> SamplingParams:
    if given is not None and single:
        raise ConfigError(f"give sampling_params or single arguments, not both: {sorted(single)}")
    if isinstance(given, SamplingParams):
        return given
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(
            f"sampling_params must be a torchrl_sglang.SamplingParams or a dict, got {type(given).__name__} of "
            f"{type(given).__module__}"
        )
    return SamplingParams.from_kwargs(**(given or single))
