"""Talk to a model in the terminal.

    torchrl-sglang chat                          # with the server at http://127.0.0.1:30000
    torchrl-sglang chat --model Qwen/Qwen3-0.6B  # launch one for as long as the chat lasts

Type a message and Enter. Ctrl-C cuts an answer short, Ctrl-D leaves.

    /image PATH   show the model an image with the next message (for models that see)
    /reset        forget what was said
    /exit         leave
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any

from torchrl_sglang.chat import Response, SGLangChat
from torchrl_sglang.cli.target import add_generation_options, add_target_options, generation_settings, target
from torchrl_sglang.errors import SGLangError

__all__ = ["SUMMARY", "add_arguments", "run"]

SUMMARY = "talk to a model in the terminal"

_HELP = "/image PATH shows an image with the next message, /reset forgets what was said, /exit leaves"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("--system", metavar="TEXT", help="system message")
    add_target_options(parser)
    add_generation_options(parser)


def run(args: argparse.Namespace) -> int:
    """Talk until the input ends."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  importing it gives input() a history and arrow keys
    with target(args) as (url, config):
        chat = SGLangChat(url, adapter=args.adapter, client=config, **generation_settings(args))
        print(f"{chat.pool.info.model_path} at {url}", file=sys.stderr)
        print(_HELP, file=sys.stderr)
        _Talk(chat, args.system).loop()
    return 0


class _Talk:
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
                print("forgotten", file=sys.stderr)
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
        except KeyboardInterrupt:  # as in a shell: the line is thrown away
            print(file=sys.stderr)
            return "" if sys.stdin.isatty() else None

    def _add_image(self, path: str) -> None:
        from torchrl_sglang.chat.data_urls import media_url

        try:
            if not path:
                print("which one? /image PATH", file=sys.stderr)
                return
            self._images.append(media_url(path, "image"))
        except SGLangError as error:
            print(error, file=sys.stderr)
            return
        print(f"{len(self._images)} image(s) go with the next message", file=sys.stderr)

    def _answer(self, text: str) -> None:
        """One turn; what fails or is cut short before its first word leaves the history as it was."""
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
            print(" [cut short]", end="", file=sys.stderr)
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
