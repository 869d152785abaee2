"""The command line: runs the subcommand, and prints an error as one message."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from torchrl_sglang.errors import ConfigError, SGLangError

__all__ = ["COMMANDS", "main"]

# A subcommand is a module of this folder with SUMMARY, add_arguments(parser) and run(args) -> int.
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
        argv: the arguments; ``None`` takes those of the program.

    Returns:
        The exit code: 0 for success, 1 after a failure, 2 for a wrong call, 130 after Ctrl-C.
    """
    parser = _parser()
    args = parser.parse_args(argv)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchrl-sglang",
        description="SGLang servers from the command line, with and without a GPU.",
        epilog="torchrl-sglang COMMAND --help describes one command.",
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
