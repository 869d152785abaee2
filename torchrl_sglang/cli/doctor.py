"""Check the installation, a running server, and with --self-test a whole weight sync.

The self-test starts a small server, generates, compares log-probs with the model, sends new weights by every
transport that is possible here, verifies that they arrived, and compares the times with that of a bare broadcast. It
takes about two minutes. The exit code is 0 when nothing failed, 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from torchrl_sglang.cli.launching import add_server_options, server_config
from torchrl_sglang.config import ClientConfig
from torchrl_sglang.progress import PhaseLine

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("url", nargs="?", metavar="URL", help="a running server to check; nothing on it is changed")
    parser.add_argument("--self-test", action="store_true", help="test everything with a small server of its own")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="file with the server's key")
    add_server_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the checks, print the findings and return the exit code."""
    from torchrl_sglang.doctor import Diagnosis, check_environment, check_server, self_test

    diagnosis = Diagnosis()
    args.model = "-"  # none is served here: the self-test makes its own
    server = server_config(args)
    launches = args.self_test or args.url is None
    diagnosis.add(*check_environment(server, launches=launches))
    if args.url is not None:
        diagnosis.add(*check_server(args.url, ClientConfig(api_key_file=args.api_key_file)))
    if args.self_test:
        with PhaseLine() as show:
            self_test(diagnosis, server, progress=show)
    if args.json:
        print(json.dumps(diagnosis.to_json(), indent=1))
    else:
        print(diagnosis.table(width=shutil.get_terminal_size().columns))
        print("all checks passed" if diagnosis.ok else "a check failed: see the lines that begin with ->")
    return 0 if diagnosis.ok else 1
