"""Causes that are read from a failed server's log. The lines are SGLang's, torch's and Python's own."""

from __future__ import annotations

import pytest

from torchrl_sglang.server.diagnosis import describe_exit, explain_failure


@pytest.mark.parametrize(
    ("log", "code", "advice"),
    [
        ("/x/bin/python: Error while finding module specification for 'sglang.launch_server' "
         "(ModuleNotFoundError: No module named 'sglang')", 1, "install-cpu-server"),
        ("/x/bin/python: No module named sglang", 1, "install-cpu-server"),
        ("ModuleNotFoundError: No module named 'sglang_router'", 1, "torchrl-sglang[router]"),
        ("ModuleNotFoundError: No module named 'orjson'", 1, "lacks the module 'orjson'"),
        ("ModuleNotFoundError: No module named 'sglang.srt.foo'", 1, "lacks the module 'sglang.srt.foo'"),
        ("sglang serve: error: unrecognized arguments: --no-such-flag 3", 2, "doesn't know --no-such-flag 3"),
        ("sglang serve: error: argument --dtype: invalid choice: 'f'", 2, "refused its command line: argument --dtype"),
        ("[Errno 98] error while attempting to bind on address ('127.0.0.1', 1): address already in use", 1, "port"),
        ("ValueError: nccl_port at 3000 is not available in 30 seconds.", 1, "took the port"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", 1, "mem_fraction_static"),
        ("RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.", 1, "mem_fraction_static"),
        ("OSError: org/x is not a local folder and is not a valid model identifier listed on", 1, "hub name"),
        ("ValueError: Unrecognized model in /x. Should have a `model_type` key", 1, "architecture"),
        ("", 137, "killed from outside"),
        ("", -9, "killed from outside"),
    ],
)  # fmt: skip
def test_known_failures_have_advice(log: str, code: int, advice: str) -> None:
    assert advice in explain_failure(f"starting\n{log}\n", code)


def test_an_unknown_failure_has_no_cause() -> None:
    assert explain_failure("ValueError: something new", 1) == ""


def test_lines_of_every_start_are_no_cause_and_sglang_killing_itself_differs_from_a_kill_from_outside() -> None:
    start = (
        "[2026-11-22 03:05:14] server_args={'on_error': 'out of memory'}\n"
        "[2026-11-22 03:05:40] Ignore import error when loading sglang.srt.models.inkling: No module named 'cutlass'\n"
    )
    assert explain_failure(start, 1) == ""
    crash = "  File \"x.py\", line 3\nKeyError: 'weights'\n\n[...] kill_process_tree called: parent_pid=4704\n"
    assert explain_failure(start + crash, 137) == "One of its processes failed: KeyError: 'weights'."
    assert "killed from outside" in explain_failure(start, 137)


def test_exit_codes_are_named() -> None:
    assert [describe_exit(code) for code in (3, 139, -15)] == [
        "exit code 3",
        "exit code 139 (SIGSEGV)",
        "exit code -15 (SIGTERM)",
    ]
