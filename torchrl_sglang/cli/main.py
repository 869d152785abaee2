"""The command line: runs the subcommand, and prints an error as one message."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from torchrl_sglang.cli.parser import Parser
from torchrl_sglang.errors import ConfigError, SGLangError

__all__ = ["COMMANDS", "main"]

# A subcommand is a module of this folder with add_arguments(parser) and run(args) -> int. Only the named command's
# module is imported, and modules import torch, transformers and torchrl inside run(): help must appear at once.
COMMANDS = {
    "serve": ("serve", "launch a server"),
    "generate": ("generate", "generate responses to prompts"),
    "chat": ("chat", "chat with a model in the terminal"),
    "gateway": ("gateway", "serve agents with OpenAI's API, and record their tokens"),
    "doctor": ("doctor", "check the installation, a server, or a whole weight sync"),
    "servers": ("servers", "show or change the list of servers that a running trainer follows"),
    "install-cpu-server": ("install_cpu_server", "install a server that needs no GPU"),
    "version": ("version", "print versions"),
}

_FAILURE, _USAGE, _INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments; ``None`` takes those of the program.

    Returns:
        The exit code: 0 for success, 1 after a failure, 2 for a wrong call, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    words = ["version"] if words == ["--version"] else words
    args = _parser(words).parse_args(words)
    try:
        return int(args.run(args))
    except ConfigError as error:
        return _print_error(error, _USAGE)
    except SGLangError as error:
        return _print_error(error, _FAILURE)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:  # the reader of the output has ended: `torchrl-sglang ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILURE


def _print_error(error: SGLangError, code: int) -> int:
    print(f"torchrl-sglang: {error}", file=sys.stderr)
    return code


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The program's parser, with the options of the command that ``words`` name."""
    parser = Parser(
        prog="torchrl-sglang",
        description="SGLang servers from the command line, with and without a GPU.",
        epilog="torchrl-sglang COMMAND --help describes one command.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    named = next((word for word in words if word in COMMANDS), None)
    for name, (module_name, summary) in COMMANDS.items():
        if name != named:
            commands.add_parser(name, help=summary)
            continue
        module = import_module(f"torchrl_sglang.cli.{module_name}")
        command = commands.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, parser=command)
    return parser
