"""report.png shows what its titles name; samples.html holds the first and the last answers, escaped and by itself."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerFast

from torchrl_sglang.recipes.batch.token_texts import byte_of_character, token_texts
from torchrl_sglang.recipes.run import report, samples_page
from torchrl_sglang.recipes.run.pictures import draw_pictures


def sample(step: int, response: list[str], **changes: Any) -> dict[str, Any]:
    count = len(response)
    return {
        "step": step,
        "prompt": "<|im_start|>user\nWhat is 5 + 2?<|im_end|>\n",
        "response_ids": list(range(count)),
        "response_tokens": response,
        "log_probs": [-0.5] * count,
        "weight_versions": [step - 1] * count,
        "reward": 0.25,
        "right": False,
        "position": 0,
        **changes,
    }


def write(folder: Path, samples: list[dict[str, Any]], tail: str = "") -> Path:
    path = folder / "samples.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in samples) + tail)
    return path


class Parsed(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(folder: Path, samples: list[dict[str, Any]], **options: Any) -> Parsed:
    assert samples_page.write_samples_page(write(folder, samples, **options), folder / "samples.html")
    return Parsed((folder / "samples.html").read_text())


def test_the_page_shows_the_first_and_the_last_step(tmp_path: Path) -> None:
    steps = [sample(step, [f"answer-{step}"]) for step in (1, 1, 2, 3)]
    page = page_of(tmp_path, steps, tail='{"step": 4, "prom')  # the run was killed while it wrote
    assert page.text.count("answer-1") == 2
    assert "answer-2" not in page.text
    assert page.text.count("answer-3") == 1
    assert "Before training: step 1" in page.text
    assert "After training: step 3" in page.text
    assert "mean reward 0.250, 0 of 2 answers right" in page.text


def test_a_run_of_one_step_is_shown_once(tmp_path: Path) -> None:
    page = page_of(tmp_path, [sample(1, ["only"])])
    assert page.text.count("only") == 1
    assert "After" not in page.text


def test_without_samples_nothing_is_written(tmp_path: Path) -> None:
    assert not samples_page.write_samples_page(tmp_path / "samples.jsonl", tmp_path / "samples.html")
    assert not samples_page.write_samples_page(write(tmp_path, [], tail='{"step"'), tmp_path / "samples.html")
    assert not (tmp_path / "samples.html").exists()


def test_what_a_model_writes_is_escaped_everywhere(tmp_path: Path) -> None:
    evil = '<script src="x">alert("&")</script>\'"'
    page = page_of(tmp_path, [sample(1, [evil, "\n"], prompt=f"<|im_start|>{evil}")])
    assert not {tag for tag, _ in page.tags} & {"script", "img", "a", "link", "iframe"}
    assert evil in page.text
    assert not any(name.startswith("on") or name in ("src", "href") for _, attrs in page.tags for name in attrs)
    titles = [attrs["title"] for tag, attrs in page.tags if tag == "span" and "title" in attrs]
    assert titles[0] is not None
    assert titles[0].startswith(repr(evil))


def test_a_token_is_coloured_by_its_log_prob_and_weight_version(tmp_path: Path) -> None:
    one = sample(1, ["sure", "rare", "none"], log_probs=[0.0, -4.7, float("nan")], weight_versions=[3, 4, -1])
    page = page_of(tmp_path, [one])
    tokens = [attrs for tag, attrs in page.tags if tag == "span" and "title" in attrs]
    styles = [str(attrs["style"]) for attrs in tokens]
    assert "hsl(30 95% 100%)" in styles[0]
    assert "hsl(30 95% 62%)" in styles[1]
    assert len({style.partition("border")[2] for style in styles}) == 3
    assert tokens[0]["title"] == "'sure': log-prob 0.000, 100.0%, weights v3"
    assert "not sampled" in str(tokens[2]["title"])
    assert "weights v3" in page.text


def test_a_large_file_is_read_at_both_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples_page, "_READ_BYTES", 2000)
    steps = [sample(step, [f"answer-{step}-"]) for step in range(1, 60)]
    page = page_of(tmp_path, steps)
    assert (tmp_path / "samples.jsonl").stat().st_size > 10000
    assert "answer-1-" in page.text
    assert "answer-59-" in page.text


def test_a_long_answer_is_cut(tmp_path: Path) -> None:
    page = page_of(tmp_path, [sample(1, [f"t{n} " for n in range(700)])])
    assert "t599 " in page.text
    assert "t600 " not in page.text


def byte_level() -> PreTrainedTokenizerFast:
    model = tokenizers.models.BPE(
        vocab={c: n for n, c in enumerate([*byte_of_character(), "Ġa", "<s>"])}, merges=[("Ġ", "a")]
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def sentence_piece() -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0, "▁a": 1, "é": 2, "b": 3, "<0x0A>": 4, "▁": 5}
    model = tokenizers.models.BPE(vocab=vocabulary, merges=[("▁", "a")][:0], unk_token="<unk>", byte_fallback=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model), unk_token="<unk>")


def test_the_texts_of_tokens_of_both_kinds_of_tokenizers() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode(" a\n€<s>", add_special_tokens=False)
    assert token_texts(tokenizer, ids) == [" a", "\n", "�", "�", "�", "<s>"]
    assert token_texts(tokenizer, tokenizer.encode("Grün", add_special_tokens=False))[:2] == ["G", "r"]
    assert token_texts(sentence_piece(), [1, 2, 3, 4, 5]) == [" a", "é", "b", "\n", " "]


def test_byte_level_texts_join_to_what_was_encoded(tokenizer: Any) -> None:
    text = "What is 2 + 3?  Answer:\n\tfive"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(token_texts(tokenizer, ids)) == text


# --------------------------------------------------------------------------------------------------------- the report

ROW = {"reward_mean": 0.5, "logprob_gap_max": 1e-5, "logprob_gap_mean": 1e-6, "train_s": 1.0, "right_rate": 0.25}


def fourth_panel(rows: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """Its title, and the labels of what it shows."""
    figure = Figure()
    axes = figure.subplots()
    report._draw_right(axes, rows, evaluations)
    return axes.get_title("left"), [line.get_label() for each in figure.axes for line in each.lines]


def test_the_fourth_panel_shows_right_answers() -> None:
    rows = [{"step": step, "staleness_max": 0, "staleness_mean": 0.0, "ess": 1.0, **ROW} for step in (1, 2)]
    assert fourth_panel(rows, []) == ("Rate of right answers", ["right answers of the step"])
    assert fourth_panel(rows, [{"step": 0, "eval_pass_at_1": 0.1}])[1][1:] == ["pass@1, held-out questions"]


def test_the_fourth_panel_shows_the_age_of_tokens_where_some_are_old() -> None:
    rows = [{"step": step, "staleness_max": step - 1, "staleness_mean": 0.5, "ess": 0.9, **ROW} for step in (1, 2)]
    title, shown = fourth_panel(rows, [])
    assert title == "Rate of right answers; age of their tokens (right axis)"
    assert shown == ["right answers of the step", "effective sample size", "mean age", "largest age"]


def test_both_files_are_drawn(tmp_path: Path) -> None:
    write(tmp_path, [sample(1, ["hello"])])
    draw_pictures([{"step": 1, **ROW}], [], tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "hello" in (tmp_path / "samples.html").read_text()


def test_a_report_without_a_rate_or_with_missing_values_is_drawn(tmp_path: Path) -> None:
    rows = [{"step": 1, "reward_mean": float("nan")}, {"step": 2, "reward_mean": torch.tensor(1.0).item()}]
    report.draw_report(rows, [], tmp_path / "report.png")
    assert fourth_panel(rows, []) == ("Rate of right answers", [])
