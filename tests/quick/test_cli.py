"""The command line without a server: output and exit codes."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from torchrl_sglang.cli import main
from torchrl_sglang.cli.main import COMMANDS

NO_SERVER = "http://127.0.0.1:9"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_text(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"usage: torchrl-sglang {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "the following arguments are required: COMMAND"),
        (["sing"], 2, "invalid choice: 'sing'"),
        (["serv", "m"], 2, "Did you mean serve?"),
        (["serve"], 2, "the following arguments are required: MODEL"),
        (["serve", "m", "--prot", "1"], 2, "unrecognized arguments: --prot 1. Did you mean --port?"),
        (["serve", "m", "--mem-fraction-static=0.5"], 2, "go into --server-args='--mem-fraction-static ...'"),
        (["serve", "m", "--tensor-parallel-size", "2"], 2, "Did you mean --tp-size?"),
        (["serve", "two", "models"], 2, "unrecognized arguments: models"),
        (["generate", "hi", "--max-tokens", "5"], 2, "Did you mean --max-new-tokens?"),
        (["generate", "hi", "--max_new_tokens=5"], 2, "Did you mean --max-new-tokens?"),
        (["generate", "hi", "--temp", "0"], 2, "Did you mean --temperature?"),
        (["generate", "hi", "--max-new", "5"], 2, "Did you mean --max-new-tokens?"),
        (["generate", "hi", "--num-samples", "2"], 2, "Did you mean -n?"),
        (["chat", "--system-prompt", "x"], 2, "Did you mean --system?"),
        (["doctor", "--selftest"], 2, "Did you mean --self-test?"),
        (["version", "--json"], 2, "unrecognized arguments: --json"),
        (["generate", "hi", "--url", "a", "--model", "b"], 2, "not allowed with argument"),
        (["generate"], 2, "no prompt: standard input is empty"),
        (["generate", "hi", "--url", NO_SERVER], 1, "nothing accepts connections at http://127.0.0.1:9"),
        (["chat", "--url", NO_SERVER], 1, "nothing accepts connections"),
        (["generate", "hi", "--url", "ftp://x"], 2, "is not the URL of a server"),
        (["generate", "hi", "--api-key-file", "/no/such/file"], 2, "can't be read"),
        (["serve", "./no-such-model"], 2, "there is no such file or folder"),
        (["serve", "m", "--port", "0"], 2, "port must be at least 1 and at most 65535"),
        (["serve", "m", "--python", "/no/python"], 2, "not an executable file"),
        (["install-cpu-server", "--venv", "{folder}"], 2, "is no virtual environment"),
    ],
)
def test_an_error_is_one_message_with_its_exit_code(
    words: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "something.txt").write_text("of yours")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    try:
        found = main([word.format(folder=tmp_path) for word in words])
    except SystemExit as end:  # argparse's own
        found = end.code
    output = capsys.readouterr()
    assert (found, output.out) == (code, "")
    assert message in output.err
    assert [file.name for file in tmp_path.iterdir()] == ["something.txt"]
