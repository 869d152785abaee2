"""Messages in, text out: a chat on SGLang servers, with tools, adapters, images, videos and sounds."""

from torchrl_sglang.chat.chat import SGLangChat
from torchrl_sglang.chat.response import Response, ToolCall

__all__ = ["Response", "SGLangChat", "ToolCall"]
