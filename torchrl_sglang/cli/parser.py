"""An argument parser that runs nothing on a mistyped option, and names the option that was meant."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import Any, NoReturn

__all__ = ["Parser"]

# What other programs call an option -> ours.
_OTHER_NAMES = {
    "--max-tokens": "--max-new-tokens",
    "--max-length": "--max-new-tokens",
    "--num-samples": "-n",
    "--num-return-sequences": "-n",
    "--top-k-tokens": "--top-k",
    "--frequency-penalty": "--repetition-penalty",
    "--system-prompt": "--system",
    "--model-path": "--model",
    "--base-url": "--url",
    "--server": "--url",
    "--api-key": "--api-key-file",
    "--tp": "--tp-size",
    "--tensor-parallel-size": "--tp-size",
    "--max-model-len": "--context-length",
    "--max-model-length": "--context-length",
    "--extra-args": "--server-args",
    "--lora": "--adapter",
    "--timeout": "--start-timeout",
}
# SGLang's own flags that no option stands for are words of --server-args.
_HINT_SERVER_ARGS = "flags of SGLang itself go into --server-args='{option} ...'"


class Parser(argparse.ArgumentParser):
    """Refuses abbreviated options; an unknown one is answered with the nearest, as are unknown commands."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and name the nearest option for each unknown one."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            parser = getattr(parsed, "parser", self)
            parser.error(f"unrecognized arguments: {' '.join(unknown)}{parser.hint(unknown)}")
        return parsed

    def hint(self, unknown: Sequence[str]) -> str:
        """What may have been meant by the first unknown option; empty if there is nothing to say."""
        option = next((word.partition("=")[0] for word in unknown if word.startswith("-")), None)
        if option is None:
            return "" if not unknown else ". Put text with spaces in quotes"
        known = [each for action in self._actions for each in action.option_strings]
        dashed = option.replace("_", "-")
        meant = dashed if dashed in known else _OTHER_NAMES.get(dashed)
        if meant not in known:
            abbreviated = [each for each in known if each.startswith(dashed)]
            close = difflib.get_close_matches(dashed, [each for each in known if each.startswith("--")], n=1)
            meant = next(iter([*abbreviated, *close]), None)
        if meant is not None:
            return f". Did you mean {meant}?"
        return f"; {_HINT_SERVER_ARGS.format(option=option)}" if "--server-args" in known else ""

    def error(self, message: str) -> NoReturn:
        """End the program with the message, exit code 2; an unknown command is answered with the nearest."""
        found = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if found:
            choices = re.findall(r"[\w-]+", found[2])
            close = difflib.get_close_matches(found[1], choices, n=1)
            message += f". Did you mean {close[0]}?" if close else ""
        super().error(message)
