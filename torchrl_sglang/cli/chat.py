"""Chat with a model in the terminal.

    torchrl-sglang chat                          # with the server at http://127.0.0.1:30000
    torchrl-sglang chat --model Qwen/Qwen3-0.6B  # launches a server until the chat ends

Type a message and press Enter. Ctrl-C interrupts an answer, Ctrl-D ends the chat.

    /image PATH   send an image with the next message (for vision models)
    /reset        delete the conversation so far
    /exit         end the chat
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING, Any

from torchrl_sglang.cli.target import add_generation_options, add_target_options, generation_settings, target
from torchrl_sglang.errors import SGLangError

if TYPE_CHECKING:
    from torchrl_sglang.chat import Response, SGLangChat

__all__ = ["add_arguments", "run"]


_HELP = "/image PATH sends an image with the next message, /reset deletes the conversation, /exit ends the chat"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("--system", metavar="TEXT", help="system message")
    add_target_options(parser)
    add_generation_options(parser)


def run(args: argparse.Namespace) -> int:
    """Chat until the input ends."""
    from torchrl_sglang.chat import SGLangChat

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() a history and arrow keys
    with target(args) as (url, config):
        chat = SGLangChat(url, adapter=args.adapter, client=config, **generation_settings(args))
        print(f"{chat.pool.info.model_path} at {url}", file=sys.stderr)
        print(_HELP, file=sys.stderr)
        _Conversation(chat, args.system).loop()
    return 0


class _Conversation:
    def __init__(self, chat: SGLangChat, system: str | None) -> None:
        self._chat = chat
        self._system = system
        self._messages: list[dict[str, Any]] = []
        self._images: list[str] = []

    def loop(self) -> None:
        while (line := self._read()) is not None:
            word, _, rest = line.partition(" ")
            if word in ("/exit", "/quit"):
                return
            if word == "/reset":
                self._messages.clear()
                self._images.clear()
                print("conversation deleted", file=sys.stderr)
            elif word == "/image":
                self._add_image(rest.strip())
            elif word.startswith("/") and word[1:].isalpha():
                print(f"unknown command {word}; {_HELP}", file=sys.stderr)
            elif line.strip():
                self._answer(line)

    def _read(self) -> str | None:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return None
        except KeyboardInterrupt:  # as in a shell: discards the line
            print(file=sys.stderr)
            return "" if sys.stdin.isatty() else None

    def _add_image(self, path: str) -> None:
        from torchrl_sglang.chat.data_urls import media_url

        try:
            if not path:
                print("the path is missing: /image PATH", file=sys.stderr)
                return
            self._images.append(media_url(path, "image"))
        except SGLangError as error:
            print(error, file=sys.stderr)
            return
        print(f"{len(self._images)} image(s) will be sent with the next message", file=sys.stderr)

    def _answer(self, text: str) -> None:
        """Run one turn. If it fails, or is interrupted before the first token, the conversation stays unchanged."""
        parts: Any = text
        if self._images:
            parts = [*({"type": "image", "image": url} for url in self._images), {"type": "text", "text": text}]
        messages = [*self._messages, {"role": "user", "content": parts}]
        finished: list[Response] = []
        pieces: list[str] = []
        try:
            with contextlib.closing(
                self._chat.iter_chat(messages, system=self._system, on_finish=finished.append)
            ) as stream:
                for piece in stream:
                    pieces.append(piece)
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [interrupted]", end="", file=sys.stderr)
        except SGLangError as error:
            print(f"{error}", file=sys.stderr)
            return
        print(flush=True)
        if finished and finished[0].finish_reason == "length":
            print(f"[cut off after {finished[0].response_length} tokens]", file=sys.stderr)
        answer = "".join(pieces)
        if answer:
            self._messages = [*messages, {"role": "assistant", "content": answer}]
            self._images.clear()
