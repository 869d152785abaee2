"""One call of a chat, ready to be sent: rendered, tokenized and checked against what the servers support."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchrl_sglang.chat.defaults import GenerationDefaults
from torchrl_sglang.chat.messages import Conversation
from torchrl_sglang.chat.template import ChatTemplate
from torchrl_sglang.chat.tool_schemas import read_tools
from torchrl_sglang.chat_templates import check_template_kwargs
from torchrl_sglang.config import SamplingParams
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.limits import check_sampling
from torchrl_sglang.protocol.media import Media

__all__ = ["Turn", "prepare_turn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One call.

    Attributes:
        ids_T: token ids of the prompt.
        media: the images, videos and sounds that the prompt mentions.
        tools: JSON schemas of the tools that the model may call.
        sampling: how tokens are drawn.
        adapter: name of the LoRA adapter, ``None`` for the pool's own.
        return_log_probs: report the log-prob of every response token.
        num_earlier_calls: number of tool calls in the conversation.
    """

    ids_T: list[int]
    media: Media
    tools: list[dict[str, Any]]
    sampling: SamplingParams
    adapter: str | None
    return_log_probs: bool
    num_earlier_calls: int = 0


def prepare_turn(
    conversation: Conversation,
    pool: SGLangPool,
    template: ChatTemplate,
    defaults: GenerationDefaults,
    *,
    tools: str | Sequence[Any] | None,
    adapter: str | None,
    return_log_probs: bool,
    template_kwargs: Mapping[str, Any] | None,
    generation: Mapping[str, Any],
) -> Turn:
    """Render a conversation and check the call's settings.

    Raises:
        ConfigError: the template refuses the conversation, a setting is unknown or bad, or the servers would ignore it.
    """
    schemas = read_tools(tools) if tools else []
    variables = check_template_kwargs(template_kwargs)
    if "tools" in variables:
        raise ConfigError(
            "template_kwargs['tools']: pass tools= instead, so that their calls are read from the response"
        )
    ids_T = template.encode(conversation, schemas, variables)
    sampling = defaults.sampling(generation, prompt_length=len(ids_T), context_length=pool.context_length)
    info = pool.info
    if adapter is not None and not info.lora_enabled:
        raise ConfigError(f"adapter={adapter!r}: {info.url} was launched without --enable-lora")
    check_sampling(sampling, vocab_size=pool.vocab_size, info=info)
    if info.skips_tokenizer:
        raise ConfigError(
            f"{info.url} was launched with --skip-tokenizer-init: its responses have no text to chat with"
        )
    if conversation.media and info.raw.get("allow_auto_truncate"):
        raise ConfigError(
            f"{info.url} was launched with --allow-auto-truncate: it would cut a prompt that its images make too long "
            "without a word. Launch it without to send media"
        )
    return Turn(
        ids_T=ids_T,
        media=conversation.media,
        tools=schemas,
        sampling=sampling,
        adapter=adapter,
        return_log_probs=return_log_probs,
        num_earlier_calls=sum(len(message.get("tool_calls") or ()) for message in conversation.messages),
    )
