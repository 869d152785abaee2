"""The numbers in docs/scale.md are those of the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchrl_sglang import SyncConfig
from torchrl_sglang.weights.group.rendezvous import group_mark

PAGE = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
ROWS = {cells[1].strip(): cells[3].strip() for line in PAGE.splitlines() if len(cells := line.split("|")) == 5}
CONFIG = SyncConfig()
NUM_SERVERS, TP_SIZE, NUM_BYTES = 64, 8, 2 * 10**12
BUCKET = CONFIG.bucket_size(NUM_BYTES)
NUM_BUCKETS = round(NUM_BYTES / BUCKET)


@pytest.mark.parametrize(
    ("row", "figure"),
    [
        ("form the group", f"{CONFIG.group_limit_s(1 + NUM_SERVERS * TP_SIZE):.0f} s"),
        ("bucket size", f"{BUCKET // 2**20} MiB, {NUM_BUCKETS:,} buckets"),
        (
            "one bucket",
            f"{CONFIG.bucket_limit_s(BUCKET):.0f} s (NCCL); {CONFIG.bucket_limit_s(BUCKET * 64):.0f} s with 64",
        ),
        ("the whole update", f"{CONFIG.deadline_s(NUM_BYTES, NUM_BUCKETS * NUM_SERVERS) / 3600:.1f} hours"),
        ("mark of a trainer on another host", f"{CONFIG.deadline_s(NUM_BYTES) / 3600:.1f} hours"),
    ],
)
def test_the_table_has_the_limits_of_the_default_settings(row: str, figure: str) -> None:
    assert figure in ROWS[row], ROWS[row]


def test_the_page_says_when_a_rank_gives_up() -> None:
    limit = group_mark("owner", 1, CONFIG.group_limit_s(2)).rpartition(".")[2]
    assert f"a rank gives up after {limit} s" in " ".join(PAGE.split())
