"""The table of models that fit on one GPU with their server is the formula above it, for the models' real sizes."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "sizing.md"
# hidden size, feed-forward size, layers, heads, key-value heads, head size (Qwen3's config.json); embeddings are tied.
SHAPES = {
    "Qwen3-0.6B": (1024, 3072, 28, 16, 8, 128),
    "Qwen3-1.7B": (2048, 6144, 28, 16, 8, 128),
    "Qwen3-4B": (2560, 9728, 36, 32, 8, 128),
}
VOCABULARY = 151_936
CONTEXT_GB = 1.0


def parameters(name: str) -> int:
    hidden, inner, layers, heads, kv_heads, size = SHAPES[name]
    attention = 2 * hidden * heads * size + 2 * hidden * kv_heads * size + 2 * size
    return VOCABULARY * hidden + layers * (attention + 3 * hidden * inner + 2 * hidden) + hidden


def test_the_models_have_the_sizes_of_their_names() -> None:
    assert [round(parameters(name) / 1e9, 1) for name in SHAPES] == [0.6, 1.7, 4.0]


def test_the_table_follows_from_the_formula() -> None:
    rows = re.findall(
        r"^\| (Qwen3\S+) \| (\d+) GB \| ([\d.]+) GB \| (.*?) \| ([\d.-]+) \| ([\d,-]+) \|$",
        PAGE.read_text(),
        re.MULTILINE,
    )
    assert {(model, gpu) for model, gpu, *_ in rows} == {(model, gpu) for model in SHAPES for gpu in ("24", "80")}
    for model, gpu, training, left, fraction, tokens in rows:
        billions, total = parameters(model) / 1e9, float(gpu)
        assert float(training) == round(16 * billions + 2 * CONTEXT_GB, 1), model
        room = total - 16 * billions - 2 * CONTEXT_GB
        if room < 0:
            assert "does not fit" in left, f"{model} does not fit on {gpu} GB"
            continue
        assert left.startswith(f"{room:.1f} GB"), (model, room)
        share = float(fraction) * (total - CONTEXT_GB - 4 * billions)
        assert 12 * billions + 2 * CONTEXT_GB + share < total, f"{model} does not fit on {gpu} GB while it generates"
        _, _, layers, _, kv_heads, size = SHAPES[model]
        per_token = 2 * layers * kv_heads * size * 2
        assert int(tokens.replace(",", "")) == round((share - 2 * billions) * 1e9 / per_token, -3), model
