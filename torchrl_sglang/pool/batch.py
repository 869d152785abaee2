"""A batch of prompts with its settings: any part of it can be sent to any server."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SamplingParams
from torchrl_sglang.config.checking import require
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.pool.streaming import generate_streaming
from torchrl_sglang.protocol.generate import build_generate, parse_generate
from torchrl_sglang.protocol.media import Media
from torchrl_sglang.protocol.messages import GenerateReply, HttpRequest

__all__ = ["Batch"]

_LEAST_WAIT_S = 0.05
_CANARY_TOKENS = 2  # one from the prompt, one from decoding


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The arguments of :meth:`SGLangPool.generate`, where they are described.

    Attributes:
        deadline: ``time.monotonic()`` value by which the last reply must have come, also of requests that are sent
            again; ``None`` gives each request the client's time-out.
        lora: name of the adapter to use, the trainer's own included.
        cache_salt: name space of the prefix caches.
        keys: names of the prompts' conversations.
    """

    ids_B_T: Sequence[Sequence[int]]
    sampling: SamplingParams
    return_logprobs: bool
    prompt_logprobs: bool
    deadline: float | None
    progress: Callable[[int], None] | None
    lora: str | None
    cache_salt: str | None
    media: Sequence[Media] | None
    keys: Sequence[Hashable] | None = None

    def __post_init__(self) -> None:
        require(self.lora is None or isinstance(self.lora, str), f"lora must be an adapter's name, got {self.lora!r}")
        if self.media is not None and (self.progress is not None or len(self.media) != len(self.ids_B_T)):
            raise ConfigError("media needs one entry per prompt, and can't be combined with progress")
        if self.keys is not None and len(self.keys) != len(self.ids_B_T):
            raise ConfigError(f"keys needs one entry per prompt, {len(self.ids_B_T)}, got {len(self.keys)}")

    @property
    def _shared(self) -> dict[str, Any]:
        return {
            "return_logprobs": self.return_logprobs,
            "prompt_logprobs": self.prompt_logprobs,
            "lora": self.lora,
            "cache_salt": self.cache_salt,
        }

    def part(self, share: Sequence[int]) -> Batch:
        """The batch of the prompts with these indices only."""
        media = None if self.media is None else [self.media[index] for index in share]
        keys = None if self.keys is None else [self.keys[index] for index in share]
        return replace(self, ids_B_T=[self.ids_B_T[index] for index in share], media=media, keys=keys)

    def build(self, share: Sequence[int]) -> HttpRequest:
        """One request for the prompts with these indices."""
        shown = None if self.media is None else [self.media[index] for index in share]
        return build_generate([self.ids_B_T[index] for index in share], self.sampling, media=shown, **self._shared)

    def canary(self) -> Batch:
        """The same prompts with one short response each, to see which of them a server survives."""
        length = min(self.sampling.max_new_tokens, _CANARY_TOKENS)
        short = replace(
            self.sampling, n=1, max_new_tokens=length, min_new_tokens=min(length, self.sampling.min_new_tokens)
        )
        return replace(self, sampling=short, progress=None)

    def _wait_s(self, client: SGLangClient) -> float:
        """Seconds that a request may take now."""
        if self.deadline is None:
            return client.config.generate_limit_s(self.sampling.max_new_tokens)
        return max(_LEAST_WAIT_S, self.deadline - time.monotonic())

    def send(self, client: SGLangClient, share: Sequence[int]) -> list[GenerateReply]:
        """Send them in one request; their replies, prompt-major."""
        if self.progress is not None:
            return generate_streaming(
                client,
                [self.ids_B_T[index] for index in share],
                self.sampling,
                progress=self.progress,
                timeout_s=self._wait_s(client),
                **self._shared,
            )
        return parse_generate(
            client.send(self.build(share), timeout_s=self._wait_s(client)),
            num_expected=len(share) * self.sampling.n,
            server=client.url,
            return_logprobs=self.return_logprobs,
            prompt_logprobs=self.prompt_logprobs,
        )
