"""Run a fake server until it is killed: ``python -m tests.fake_sglang --model-path FOLDER --port 0``.

Prints ``ready http://host:port`` as soon as it answers. Faults are armed over HTTP: ``/fake/faults``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from dataclasses import fields
from pathlib import Path
from typing import Any

from tests.fake_sglang.faults import Fault
from tests.fake_sglang.server import FakeServer
from tests.fake_sglang.settings import FakeSettings


def _from_command_line() -> FakeSettings:
    parser = argparse.ArgumentParser(prog="python -m tests.fake_sglang", description=__doc__)
    for field in fields(FakeSettings):
        flag = "--" + field.name.replace("_", "-")
        if field.name == "faults":
            parser.add_argument(flag, type=json.loads, default=[], help="JSON list of faults")
        elif isinstance(field.default, bool):
            parser.add_argument(flag, action="store_true")
        elif field.name == "model_path":
            parser.add_argument(flag, required=True)
        else:
            kind = type(field.default) if field.default is not None else str
            parser.add_argument(flag, type=kind, default=field.default)
    parser.add_argument("--config", help="JSON file with api-key and admin-api-key, as torchrl_sglang writes it")
    record = vars(parser.parse_args())
    path = record.pop("config")
    named = json.loads(Path(path).read_text()) if path is not None else {}
    return _settings(record | {name.replace("-", "_"): value for name, value in named.items()})


def _settings(record: dict[str, Any]) -> FakeSettings:
    return FakeSettings(**record | {"faults": tuple(Fault.from_json(fault) for fault in record["faults"])})


def _die_with_parent() -> None:
    """Exit when standard input ends: the parent holds it open, so it ends with the parent, even one that was killed."""
    sys.stdin.read()
    os._exit(0)


def main() -> None:
    """Serve until the process is killed."""
    if sys.argv[1:] == ["--settings-on-stdin"]:
        settings = _settings(json.loads(sys.stdin.readline()))
        threading.Thread(target=_die_with_parent, daemon=True).start()
    else:
        settings = _from_command_line()
    server = FakeServer(settings, exit_on_death=True).start()
    sys.stdout.write(f"ready {server.url}\n")
    sys.stdout.flush()
    threading.Event().wait()


if __name__ == "__main__":
    main()
