"""Chats with served models: messages in, text out, with tools, adapters, images, videos and sounds.

May be imported from here: the names in ``__all__``; they are also in the package root, except ``ToolCall`` and
``RejectedCall``.
"""

from torchrl_sglang.chat.chat import SGLangChat
from torchrl_sglang.chat.response import RejectedCall, Response, ToolCall

__all__ = ["RejectedCall", "Response", "SGLangChat", "ToolCall"]
