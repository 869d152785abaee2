"""What is shown while something loads: phases in words, one line each where there is no terminal."""

from __future__ import annotations

import io

import pytest

from torchrl_sglang.progress import PhaseLine
from torchrl_sglang.server.start_phases import start_phase

# From the log of SGLang 0.5.23 on a CPU, cut.
LOG = [
    "site-packages/sglang/launch_server.py:71: UserWarning: 'python -m sglang.launch_server' is still supported",
    "[2026-11-26 00:02:29] \x1b[1;33m'--disable-cuda-graph' is deprecated and will be removed in a future release.",
    "[2026-11-26 00:02:48] server_args={'model_path': '/m', 'load_format': 'auto'}",
    "[2026-11-26 00:03:06] Using default HuggingFace chat template with detected content format: string",
    "[2026-11-26 00:04:22] Init parallel begin.",
    "[2026-11-26 00:04:29] Ignore import error when loading sglang.srt.models.inkling: No module named 'cutlass'",
    "[2026-11-26 00:04:31] Load weight begin. avail mem=10.61 GB",
    "Multi-thread loading shards:   0% Completed | 0/2 [00:00<?, ?it/s]\rMulti-thread loading shards:  50% Completed",
    "[2026-11-26 00:04:36] Load weight end. elapsed=5.50 s, type=LlamaForCausalLM, avail mem=9.85 GB",
    "[2026-11-26 00:04:44] KV Cache is allocated. dtype: torch.float32, #tokens: 8192, K size: 0.18 GB",
    "[2026-11-26 00:04:44] Disable prefill CUDA graph because cuda_graph_config resolved prefill.backend='disabled'",
    "[2026-11-26 00:04:44] INFO:     Uvicorn running on http://127.0.0.1:21574 (Press CTRL+C to quit)",
]
PHASES = (
    *("importing SGLang", "importing SGLang", "starting its workers", "starting its workers", "starting its workers"),
    *("starting its workers", "loading the weights", "loading the weights", "allocating the KV cache"),
    *("allocating the KV cache", "allocating the KV cache", "opening its port"),
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("length", range(len(LOG) + 1))
def test_a_starts_phase_is_read_from_the_log_and_shows_none_of_it(length: int) -> None:
    phase = start_phase("\n".join(LOG[:length]))
    assert phase.startswith((PHASES[0], *PHASES)[length])
    assert "usually" in phase
    assert "2026" not in phase


def test_the_percentage_of_a_large_models_loading_is_shown() -> None:
    assert start_phase("\n".join(LOG[:8])).endswith(", 50 %")
    assert not start_phase("\n".join(LOG[:9])).endswith("%")


def test_a_log_file_gets_one_line_per_phase_and_no_carriage_return() -> None:
    log = io.StringIO()
    with PhaseLine(stream=log) as show:
        for second in range(4):
            for server in ("http://a:1: ", "http://b:1: "):  # two servers take turns
                show(f"{server}importing (usually 8 s), {second} s")
        show("http://a:1: loading, 10 %, 5 s")
        show("http://a:1: loading, 90 %, 6 s")
    expected = ["http://a:1: importing (usually 8 s)", "http://b:1: importing (usually 8 s)", "http://a:1: loading"]
    assert log.getvalue().split("\n") == [*expected, ""]


def test_a_terminal_gets_one_line_that_is_removed_at_the_end() -> None:
    terminal = Terminal()
    with PhaseLine("SmolLM2: ", stream=terminal) as show:
        show("a long text, 1 s")
        show("short")
    assert "\n" not in terminal.getvalue()
    last_two = terminal.getvalue().split("\r")[-3:-1]
    assert last_two[0].rstrip() == "SmolLM2: short"
    assert last_two[1].strip() == "", "the line is blank again"
    assert len(last_two[0]) >= len("SmolLM2: a long text, 1 s"), "the rest of the longer line is overwritten"
