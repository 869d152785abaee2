"""The command line: finds the subcommand, runs it, and says errors in one message."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from torchrl_sglang.errors import ConfigError, SGLangError

__all__ = ["COMMANDS", "main"]

# A subcommand is a module of this folder with SUMMARY, add_arguments(parser) and run(args) -> int. One more: one line.
COMMANDS = {
    "serve": "serve",
    "generate": "generate",
    "chat": "chat",
    "doctor": "doctor",
    "install-cpu-server": "install_cpu_server",
    "version": "version",
}

_FAILURE, _USAGE, _INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: its words; ``None`` takes those the program was started with.

    Returns:
        The exit code: 0, 1 when something failed, 2 when it was called wrongly, 130 after Ctrl-C.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except ConfigError as error:
        return _say(error, _USAGE)
    except SGLangError as error:
        return _say(error, _FAILURE)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:  # the reader of our output is gone: `torchrl-sglang ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILURE


def _say(error: SGLangError, code: int) -> int:
    print(f"torchrl-sglang: {error}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchrl-sglang",
        description="SGLang servers from the command line, with and without a GPU.",
        epilog="torchrl-sglang COMMAND --help says more about each.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module_name in COMMANDS.items():
        module = import_module(f"torchrl_sglang.cli.{module_name}")
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser
