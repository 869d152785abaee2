"""Each way in which a server can't be reached, or refuses a key, has a message of its own that says what to do."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fake_sglang import FakeServer, FakeSettings
from torchrl_sglang import AsyncSGLang, ConfigError, SGLangWeightSyncScheme, SGLangWrapper
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.errors import RequestRejectedError, ServerUnreachableError
from torchrl_sglang.pool import resolve_pool
from torchrl_sglang.protocol.control import build_flush
from torchrl_sglang.server_url import base_url


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("host:30000", "http://host:30000"),
        ("http://host:30000/", "http://host:30000"),
        (" https://host ", "https://host"),
        ("0.0.0.0:30000", "http://127.0.0.1:30000"),
        ("http://[::]:30000", "http://[::1]:30000"),
        ("[::1]:30000", "http://[::1]:30000"),
        ("localhost/llm", "http://localhost/llm"),
        ("10.0.0.1", "http://10.0.0.1"),
        ("http://proxy/llm/", "http://proxy/llm"),
    ],
)
def test_addresses_are_brought_into_one_form(given: str, expected: str) -> None:
    assert base_url(given) == expected
    assert base_url(expected) == expected


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/v1/chat/completions", "/generate", "/health"])
def test_the_path_of_an_api_is_refused_with_the_url_to_use(path: str) -> None:
    with pytest.raises(ConfigError, match=r"ends in /.*the server itself is 'http://host:30000'"):
        base_url(f"http://host:30000{path}")


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "/data/llama", "./checkpoint", "~/models/llama"])
@pytest.mark.parametrize("use", [SGLangWrapper, AsyncSGLang.connect, SGLangWeightSyncScheme, resolve_pool])
def test_a_model_in_place_of_a_server_is_answered_with_the_line_to_write(use: Any, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        use(name)
    assert f'AsyncSGLang.from_pretrained("{name}")' in str(caught.value)


def test_a_folder_in_the_working_directory_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert base_url("model") == "http://model"  # a host may have the name of some folder
    (tmp_path / "model" / "config.json").touch()
    with pytest.raises(ConfigError, match="from_pretrained"):
        base_url("model")


def test_a_path_object_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="from_pretrained"):
        resolve_pool(tmp_path)  # type: ignore[arg-type]


def test_a_key_in_a_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="pass the key as api_key=") as caught:
        base_url("http://user:open-sesame@host:30000")
    assert "open-sesame" not in str(caught.value)


@pytest.mark.parametrize("wrong", [None, "", 30000, "http://host:port", "ftp://host", "http://host:99999999"])
def test_what_is_no_url_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="expected something like|must be a string such as"):
        AsyncSGLang.connect(wrong)


def test_a_query_is_refused() -> None:
    with pytest.raises(ConfigError, match="the server itself is 'http://host:1'"):
        base_url("http://host:1/?key=1")


class Vllm:
    """Has a ``generate`` method, as vLLM's engines do."""

    __module__ = "vllm.entrypoints.llm"

    def generate(self) -> None: ...


class Model(torch.nn.Module):
    def generate(self) -> None: ...


@pytest.mark.parametrize(
    ("servers", "message"),
    [
        (Model(), "TransformersWrapper.*from_pretrained.*update_weights"),
        (Vllm(), "of vLLM: launch SGLang servers"),
        (None, "must be an AsyncSGLang, an SGLangPool or URLs"),
        ([], "must be an AsyncSGLang, an SGLangPool or URLs"),
    ],
)
def test_an_object_that_generates_in_another_way_is_refused(servers: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SGLangWrapper(servers)


def test_an_unknown_host_is_told_from_one_that_does_not_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: Any, **kwargs: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ServerUnreachableError, match="the host 'no-such-host' is unknown.*from_pretrained"):
        SGLangClient("no-such-host:30000").connect()
    with pytest.raises(ServerUnreachableError, match=r'from_pretrained\("SmolLM2"\)'):
        SGLangClient("SmolLM2").connect()
    with pytest.raises(
        ServerUnreachableError, match="the host 'no.such.host' is unknown.*Check its spelling"
    ) as caught:
        SGLangClient("http://no.such.host").connect()
    assert "from_pretrained" not in str(caught.value)
    monkeypatch.undo()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(ServerUnreachableError, match="nothing accepts connections at"):
            SGLangClient(f"127.0.0.1:{taken.getsockname()[1]}").connect()


def test_a_url_without_a_port_is_told_sglangs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(ServerUnreachableError, match="The URL has no port; SGLang's own is 30000"):
        SGLangClient("127.0.0.1").connect()


def refusal(url: str, **keys: str) -> str:
    with pytest.raises(RequestRejectedError, match="401") as caught:
        AsyncSGLang.connect(url, **keys)
    assert not any(key in str(caught.value) for key in keys.values())
    return str(caught.value)


def test_a_missing_and_a_wrong_key_have_messages_of_their_own(tiny_llama: Path) -> None:
    with FakeServer(FakeSettings(model_path=tiny_llama, api_key="plain")) as fake:
        assert "No key was sent: pass the server's --api-key as api_key=" in refusal(fake.url)
        assert "The key that was sent as api_key= is not the one" in refusal(fake.url, api_key="wrong-one")


def test_a_control_call_names_the_admin_key(tiny_llama: Path) -> None:
    settings = FakeSettings(model_path=tiny_llama, api_key="plain", admin_api_key="admin")
    with FakeServer(settings) as fake, AsyncSGLang.connect(fake.url, api_key="plain") as servers:
        with pytest.raises(RequestRejectedError, match="--admin-api-key as admin_api_key="):
            servers.flush_cache()
        client = servers.pool.clients[0]
        with pytest.raises(RequestRejectedError, match="No key was sent: this call needs"):
            SGLangClient(client.url).send(build_flush())
