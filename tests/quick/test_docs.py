"""The documentation matches the code: quoted messages exist, public names are described, tutorial pages are current."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from torchrl.weight_update import weight_sync_schemes

import torchrl_sglang
from docs import render_tutorials

ROOT = Path(__file__).resolve().parents[2]
TROUBLE = (ROOT / "docs" / "troubleshooting.md").read_text()
API = "\n".join(path.read_text() for path in sorted((ROOT / "docs" / "api").glob("*.rst")))
ENTRY = re.compile(r"^(`.+`)\n: (.*)", re.MULTILINE)


def texts_in(source: str) -> Iterator[str]:
    """All strings of a Python source, with ``…`` for the values in f-strings."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)


def contains(messages: list[str], quoted: str) -> bool:
    """Whether one message contains the parts of ``quoted`` between ``…``, in this order."""
    pattern = re.compile(".*?".join(re.escape(part.strip()) for part in quoted.split("…")), re.DOTALL)
    return any(pattern.search(message) for message in messages)


@pytest.fixture(scope="module")
def messages() -> list[str]:
    package = ROOT / "torchrl_sglang"
    files = [path for path in package.rglob("*.py") if "cpu_stand_ins" not in path.parts]
    found = [text for path in files for text in texts_in(path.read_text())]
    return [*found, *texts_in(inspect.getsource(weight_sync_schemes))]


def test_every_message_in_the_troubleshooting_page_is_in_the_code(messages: list[str]) -> None:
    entries = ENTRY.findall(TROUBLE)
    assert len(entries) > 80, "the pattern finds no entries"
    classes = {name for name in torchrl_sglang.__all__ if name.endswith("Error")}
    quoted = [text for terms, _ in entries for text in re.findall(r"`([^`]+)`", terms)]
    unknown = [text for text in quoted if text not in classes and not contains(messages, text)]
    assert "\n".join(unknown) == "", "no message of the code contains these"


def test_a_message_that_is_not_in_the_code_is_detected(messages: list[str]) -> None:
    assert not contains(messages, "the server has … gone fishing")
    assert not contains(messages, "and was ended … the server is not ready after")


def test_the_troubleshooting_page_explains_every_class_of_error() -> None:
    explained = {terms.strip("`") for terms, _ in ENTRY.findall(TROUBLE)}
    assert {name for name in torchrl_sglang.__all__ if name.endswith("Error")} <= explained


def test_the_api_pages_describe_every_public_name() -> None:
    described = set(re.findall(r"^\.\. auto\w+:: torchrl_sglang\.(\w+)$", API, re.MULTILINE))
    assert set(torchrl_sglang.__all__) - described == set(), "add them to a page in docs/api/"


@pytest.mark.parametrize("name", render_tutorials.ORDER)
def test_a_tutorials_page_shows_the_current_script(name: str) -> None:
    page = (ROOT / "docs" / "tutorials" / f"{name}.rst").read_text()
    assert page == render_tutorials.stored_page(name), "run: python docs/render_tutorials.py prose"
    for figure in re.findall(r"^\.\. image:: (\S+)$", page, re.MULTILINE):
        assert (ROOT / "docs" / "tutorials" / figure).is_file()


def test_every_tutorial_has_a_page() -> None:
    assert {path.stem for path in (ROOT / "tutorials").glob("*.py")} == set(render_tutorials.ORDER)


SCRIPT = '''"""
Title
=====
"""
x = 1

# %%
# More
# ----
# prose

# a comment of the code
y = 2
# %%
# The end.
'''


def test_a_script_is_split_into_prose_and_code() -> None:
    blocks = render_tutorials.read_blocks(SCRIPT)
    assert [block.prose for block in blocks] == ["Title\n=====", "More\n----\nprose", "The end."]
    assert [block.code for block in blocks] == ["x = 1", "# a comment of the code\ny = 2", ""]
    assert [SCRIPT.splitlines()[block.line - 1] for block in blocks[:2]] == ["x = 1", "# a comment of the code"]


def test_a_page_shows_prose_code_output_and_figures_in_order() -> None:
    blocks = render_tutorials.read_blocks(SCRIPT)
    figure = {"file": "t_1.png", "alt": "a curve"}
    ran = [
        {"code": "x = 1", "printed": [], "figures": []},
        {"code": "# a comment of the code\ny = 2", "printed": ["2", "", "3"], "figures": [figure]},
        {"code": "", "printed": [], "figures": []},
    ]
    page = render_tutorials.page("t", blocks, {"ran_on": "2 CPU cores", "blocks": ran})
    order = ["Title", "a real run on 2 CPU cores", "   x = 1", "More", "   y = 2", ":class: output", "   2\n\n   3"]
    places = [page.index(text) for text in [*order, ".. image:: t_1.png\n   :alt: a curve", "The end."]]
    assert places == sorted(places)


def test_a_page_is_not_rendered_from_the_run_of_different_code() -> None:
    blocks = render_tutorials.read_blocks(SCRIPT)
    ran = [{"code": block.code.replace("2", "3"), "printed": [], "figures": []} for block in blocks]
    with pytest.raises(render_tutorials.TutorialError, match="render_tutorials.py run t"):
        render_tutorials.page("t", blocks, {"ran_on": "", "blocks": ran})
