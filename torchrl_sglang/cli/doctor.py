"""Check the installation, a running server, and with --self-test a whole weight sync.

The self-test starts a small server, generates, compares log-probs with the model, sends new weights over NCCL (gloo
without a GPU), verifies that they arrived, and compares the transfer time with a bare broadcast. It takes about two
minutes. The exit code is 0 when nothing failed, 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from torchrl_sglang.cli.launching import add_server_options, server_config
from torchrl_sglang.cli.secrets import key_from
from torchrl_sglang.config import ClientConfig
from torchrl_sglang.doctor import Diagnosis, check_environment, check_server, self_test

__all__ = ["SUMMARY", "add_arguments", "run"]

SUMMARY = "check the installation, a server, or a whole weight sync"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("url", nargs="?", metavar="URL", help="a running server to check; nothing on it is changed")
    parser.add_argument("--self-test", action="store_true", help="test everything with a small server of its own")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="file with the server's key")
    add_server_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the checks, print the findings and return the exit code."""
    diagnosis = Diagnosis()
    diagnosis.add(*check_environment(args.python))
    if args.url is not None:
        diagnosis.add(*check_server(args.url, ClientConfig(api_key=key_from(args.api_key_file))))
    if args.self_test:
        args.model = "-"  # the self-test makes its own model
        self_test(diagnosis, server_config(args), progress=_Steps())
    if args.json:
        print(json.dumps(diagnosis.to_json(), indent=1))
    else:
        print(diagnosis.table(width=shutil.get_terminal_size().columns))
        print("all checks passed" if diagnosis.ok else "a check failed: see the lines that begin with ->")
    return 0 if diagnosis.ok else 1


class _Steps:
    """Shows the current step on standard error: on a terminal in one line, else one line per step."""

    def __init__(self) -> None:
        self._shown = ""

    def __call__(self, line: str) -> None:
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{line[:width]:<{width}}", end="\r", file=sys.stderr, flush=True)
        elif ": " not in line and line != self._shown:  # without the server's own lines, one per second
            print(line, file=sys.stderr, flush=True)
        self._shown = line
