"""The animation in the README is drawn from the recorded run, stands alone, and ends with what the run has learnt."""

from __future__ import annotations

import json
import re
from typing import Any
from xml.etree import ElementTree

import pytest

from docs import record_demo

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def run() -> dict[str, Any]:
    return json.loads(record_demo.RECORD.read_text())  # type: ignore[no-any-return]


def test_the_picture_is_drawn_from_the_record(run: dict[str, Any]) -> None:
    assert record_demo.PICTURE.read_text() == record_demo.draw(run), "run: python docs/record_demo.py draw"


def test_it_shows_what_was_learnt(run: dict[str, Any]) -> None:
    first, last = run["answers"][0], run["answers"][-1]
    assert not first["right"]
    assert last["right"]
    assert {"question": "What is 5 + 2?", "response": "5 + 2 = 7"}.items() <= run["answers"][-2].items()
    assert [answer["weight_version"] for answer in run["answers"]] == list(range(16))


def test_it_refers_to_nothing_outside_and_shows_no_path(run: dict[str, Any]) -> None:
    picture = record_demo.draw(run)
    texts = [each.text or "" for each in ElementTree.fromstring(picture).iter(f"{SVG}text")]
    assert len(texts) > 100
    assert not re.search(r"href|url\(|<script|<image", picture)
    assert not any(re.search(r"/(home|root|tmp|work|usr)\b", text) for text in [*texts, json.dumps(run)])


def test_everything_is_shown_within_the_animation(run: dict[str, Any]) -> None:
    times = [float(number) for number in re.findall(r"([\d.]+)% \{", record_demo.draw(run))]
    assert max(times) <= 100
    without_last = [number for number in times if number < 100]
    assert max(without_last) / 100 * record_demo.SECONDS < record_demo.SECONDS - 3, "the last frame stays for 3 s"


def test_a_long_line_ends_after_one_of_its_parts() -> None:
    line = "step 1 | reward 0.1 | " + "x" * 200
    assert record_demo.shorten(line) == "step 1 | reward 0.1 | …"
    assert record_demo.shorten("short") == "short"


def test_a_steps_typical_answer_is_the_most_frequent_one_to_its_first_question() -> None:
    def sample(position: int, response: str, reward: float = 0.0) -> dict[str, Any]:
        prompt = f"<|im_start|>user\nWhat is {position}? Answer with only the number.<|im_end|>\n"
        return {
            "step": 3,
            "position": position,
            "prompt": prompt,
            "response": response,
            "reward": reward,
            "weight_version": 2,
            "right": reward > 0,
        }

    step = [
        sample(7, "once"),
        sample(7, "twice<|im_end|>", 0.5),
        sample(7, "twice<|im_end|>", 0.5),
        *[sample(8, "b")] * 9,
    ]
    chosen = record_demo.typical(step)
    assert (chosen["question"], chosen["response"], chosen["reward"], chosen["right"]) == (
        "What is 7?",
        "twice",
        0.5,
        True,
    )
    assert record_demo.typical([sample(7, "a"), sample(7, "b")])["response"] == "a"


def test_text_of_the_model_is_escaped() -> None:
    answer = {"weight_version": 0, "question": "<q>", "response": "a & <b>\n", "reward": 0.0, "right": False, "step": 1}
    run = {"ran_on": "x", "printed": [{"at_s": 1, "text": "step 1 | <c>"}], "answers": [answer]}
    texts = [each.text for each in ElementTree.fromstring(record_demo.draw(run)).iter(f"{SVG}text")]
    assert {"<q>", "a & <b>↵", "step 1 | <c>"} <= set(texts)
