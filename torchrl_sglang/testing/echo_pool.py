"""A pool without servers, for tests: every response is its prompt reversed, repeated up to the length limit."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence

from torchrl_sglang.config import SamplingParams
from torchrl_sglang.protocol.limits import check_prompts
from torchrl_sglang.protocol.messages import GenerateReply

__all__ = ["EchoPool"]


class EchoPool:
    """Answers like :class:`~torchrl_sglang.SGLangPool`, but computes each response from the prompt alone.

    For programs and tests of what surrounds a policy. The log-prob of token ``i`` is ``-i / 1000``; the token id
    ``eos_id`` ends a response.

    Args:
        vocab_size: number of valid token ids.
        eos_id: the id that ends a response.
        context_length: limit of prompt plus response, in tokens.

    Attributes:
        requests: the prompts of every call of :meth:`generate`, in order.

    Examples:
        >>> reply = EchoPool().generate([[5, 6, 7]], SamplingParams(max_new_tokens=4))[0]
        >>> reply.output_ids, reply.finish_reason
        ([7, 6, 5, 7], 'length')
    """

    def __init__(self, *, vocab_size: int = 320, eos_id: int = 2, context_length: int = 2048) -> None:
        self.vocab_size = vocab_size
        self.eos_id = eos_id
        self.context_length = context_length
        self.max_prompt_tokens = context_length - 1
        self.weight_version = 0
        self.requests: list[list[list[int]]] = []
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if k != "_lock"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def check(self, ids_B_T: Sequence[Sequence[int]], sampling: SamplingParams) -> None:
        """Raise the error that :meth:`generate` would raise."""
        check_prompts(
            ids_B_T,
            max_new_tokens=sampling.max_new_tokens,
            vocab_size=self.vocab_size,
            max_prompt_tokens=self.max_prompt_tokens,
            context_length=self.context_length,
        )

    def generate(
        self,
        ids_B_T: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        return_logprobs: bool = True,
        prompt_logprobs: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> list[GenerateReply]:
        """``sampling.n`` replies per prompt, prompt-major."""
        self.check(ids_B_T, sampling)
        with self._lock:
            self.requests.append([list(ids_T) for ids_T in ids_B_T])
        requested = {"return_logprobs": return_logprobs, "prompt_logprobs": prompt_logprobs}
        replies = [self._answer(ids_T, sampling, **requested) for ids_T in ids_B_T for _ in range(sampling.n)]
        if progress is not None:
            progress(sum(len(reply.output_ids) for reply in replies))
        return replies

    def _answer(
        self, ids_T: Sequence[int], sampling: SamplingParams, *, return_logprobs: bool, prompt_logprobs: bool
    ) -> GenerateReply:
        echo = list(itertools.islice(itertools.cycle(reversed(ids_T)), sampling.max_new_tokens))
        ends = {*sampling.stop_token_ids} if sampling.ignore_eos else {self.eos_id, *sampling.stop_token_ids}
        stop = next((i for i, token in enumerate(echo) if token in ends), None)
        output_ids = echo if stop is None else echo[: stop + 1]
        return GenerateReply(
            output_ids=output_ids,
            output_logprobs=[-i / 1000 for i in output_ids] if return_logprobs else None,
            prompt_logprobs=[None, *(-i / 1000 for i in ids_T[1:])] if prompt_logprobs else None,
            finish_reason="length" if stop is None else "stop",
            matched=None if stop is None else echo[stop],
            prompt_tokens=len(ids_T),
            completion_tokens=len(output_ids),
            weight_version=str(self.weight_version),
            server="echo",
        )
