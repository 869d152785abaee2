"""Which local files the messages of a conversation may name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.fake_sglang import FakeServer
from torchrl_sglang.chat import SGLangChat
from torchrl_sglang.chat.data_urls import media_url
from torchrl_sglang.chat.media_files import check_roots
from torchrl_sglang.chat.messages import read_conversation
from torchrl_sglang.errors import ConfigError

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A picture in an open folder; a secret lies beside that folder."""
    folder = tmp_path / "open"
    folder.mkdir()
    Image.new("RGB", (2, 2)).save(folder / "a b.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "secret.png")
    return folder / "a b.png"


def ask(part: dict[str, Any], **settings: Any) -> Any:
    return read_conversation([{"role": "user", "content": [part, {"type": "text", "text": "?"}]}], **settings).media


def forms(path: Path) -> list[dict[str, Any]]:
    return [
        {"type": "image", "image": str(path)},
        {"type": "image", "image": path},
        {"type": "image", "path": str(path)},
        {"type": "image", "url": path.as_uri()},
        {"type": "image_url", "image_url": {"url": path.as_uri()}},
        {"type": "image_url", "image_url": f"FILE://localhost{path.as_uri().removeprefix('file://')}"},
    ]


def test_by_default_a_message_names_no_local_file_and_an_argument_any(picture: Path) -> None:
    for part in forms(picture):
        with pytest.raises(ConfigError, match=r"no folder is open to messages.*media_roots=\[FOLDER\].*images="):
            ask(part)
    assert ask({"type": "image"}, images=[picture]).images == (media_url(picture, "image"),)
    for kind in ("video", "audio"):
        with pytest.raises(ConfigError, match="no folder is open"):
            ask({"type": kind, kind: "/etc/passwd"})


def test_files_in_an_open_folder_are_read_and_others_are_not(picture: Path) -> None:
    roots = check_roots([picture.parent])
    for part in forms(picture):
        assert ask(part, media_roots=roots).images == (media_url(picture, "image"),)
    outside = picture.parent.parent / "secret.png"
    for path in (
        str(outside),
        f"{picture.parent}/../secret.png",
        outside.as_uri(),
        f"file://{picture.parent}/%2e%2e/secret.png",
        "/etc/passwd",
    ):
        with pytest.raises(ConfigError, match="lies outside of the folders"):
            ask({"type": "image", "image": path}, media_roots=roots)


def test_a_link_counts_as_what_it_leads_to(picture: Path, tmp_path: Path) -> None:
    roots = check_roots([picture.parent])
    (picture.parent / "out.png").symlink_to(tmp_path / "secret.png")
    (picture.parent / "up").symlink_to(tmp_path)
    for name in ("out.png", "up/secret.png"):
        with pytest.raises(ConfigError, match="lies outside"):
            ask({"type": "image", "image": str(picture.parent / name)}, media_roots=roots)
    (tmp_path / "in.png").symlink_to(picture)
    (tmp_path / "folder").symlink_to(picture.parent)
    assert ask({"type": "image", "image": str(tmp_path / "in.png")}, media_roots=roots).images
    assert ask({"type": "image", "image": str(picture)}, media_roots=check_roots([tmp_path / "folder"])).images


def test_a_sibling_whose_name_begins_alike_is_another_folder(picture: Path, tmp_path: Path) -> None:
    (tmp_path / "open-not").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "open-not" / "a.png")
    with pytest.raises(ConfigError, match="lies outside"):
        ask({"type": "image", "image": str(tmp_path / "open-not" / "a.png")}, media_roots=check_roots([picture.parent]))


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for bad, words in (
        (tmp_path / "pipe", "no regular file"),
        ("/dev/zero", "no regular file"),
        (tmp_path, "no regular file"),
        (tmp_path / "loop", "can't be read"),
        (tmp_path / "none.png", "can't be read"),
        ("a\0b", "can't be read"),
        ("~nobody-of-this-name/a.png", "can't be read"),
        ("s3://bucket/a.png", "scheme that is not supported"),
        ("file://host/a.png", "no URL of a file on this machine"),
        ("file:a.png", "no URL of a file on this machine"),
    ):
        with pytest.raises(ConfigError, match=words):
            media_url(bad, "image")


def test_a_chat_takes_folders_and_refuses_what_is_none(fake: FakeServer, tmp_path: Path) -> None:
    for roots, words in (("/", "must be a list of folders"), ([tmp_path / "none"], "no folder on this machine")):
        with pytest.raises(ConfigError, match=words):
            SGLangChat(fake.url, media_roots=roots)
    chat = SGLangChat(fake.url, media_roots=[tmp_path])
    message = {"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}
    with pytest.raises(ConfigError, match="lies outside"):
        chat.chat([message])
    assert not [event for event in fake.events if "/generate" in str(event)]
