"""Servers behind ``https://``: a private authority is trusted if the settings name it; all others are refused.

A TLS-terminating proxy is in front of the fake server; OpenSSL makes its certificates.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.fake_sglang import FakeServer, FakeSettings
from tests.fake_sglang.model import read_checkpoint
from torchrl_sglang import (
    AsyncSGLang,
    ClientConfig,
    ConfigError,
    ServerLostError,
    ServerUnreachableError,
    SyncConfig,
    WeightSync,
)
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool

IDS = [[3, 4, 5], [6, 7]]


class TlsProxy:
    """Terminates TLS and forwards the bytes; ``cut`` closes the next connection after forwarding the request."""

    def __init__(self, target: int, certificate: Path, key: Path) -> None:
        self._target = target
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, key)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.cut = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                raw, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(raw,), daemon=True).start()

    def _serve(self, raw: socket.socket) -> None:
        with contextlib.suppress(OSError), raw:
            client = self._context.wrap_socket(raw, server_side=True)
            with client, socket.create_connection(("127.0.0.1", self._target)) as server:
                threading.Thread(target=self._forward, args=(server, client), daemon=True).start()
                while data := client.recv(65536):
                    server.sendall(data)
                    if self.cut.is_set() and b"/generate" in data:
                        self.cut.clear()
                        raw.shutdown(socket.SHUT_RDWR)
                        return

    @staticmethod
    def _forward(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.close()


def openssl(*words: str) -> None:
    subprocess.run(["openssl", *words], check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``ca.pem``, and ``server.pem`` with ``server.key`` for 127.0.0.1, signed by it."""
    if shutil.which("openssl") is None:
        assert not os.environ.get("CI"), "the openssl command is missing"
        pytest.skip("needs the openssl command")
    folder = tmp_path_factory.mktemp("certificates")
    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    ca, ca_key, key, request = (str(folder / name) for name in ("ca.pem", "ca.key", "server.key", "server.csr"))
    openssl("req", "-x509", *new_key, "-keyout", ca_key, "-out", ca, "-days", "2", "-subj", "/CN=Our own authority")
    openssl("req", *new_key, "-keyout", key, "-out", request, "-subj", "/CN=server")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\nauthorityKeyIdentifier=keyid\n")
    openssl(
        *("x509", "-req", "-in", request, "-CA", ca, "-CAkey", ca_key, "-CAcreateserial", "-days", "2"),
        *("-extfile", str(folder / "names"), "-out", str(folder / "server.pem")),
    )
    return folder


@pytest.fixture(scope="module")
def fake(tiny_llama: Path) -> Iterator[FakeServer]:
    with FakeServer(FakeSettings(model_path=tiny_llama, api_key="open-sesame")) as server:
        yield server


@pytest.fixture
def proxy(fake: FakeServer, certificates: Path) -> Iterator[TlsProxy]:
    made = TlsProxy(int(fake.url.rsplit(":", 1)[1]), certificates / "server.pem", certificates / "server.key")
    yield made
    made.close()


def test_a_certificate_of_a_private_authority_is_trusted_if_the_settings_name_the_authority(
    proxy: TlsProxy, certificates: Path
) -> None:
    settings = {"ca_certificate": str(certificates / "ca.pem"), "api_key": "open-sesame"}
    with AsyncSGLang.connect(f"https://127.0.0.1:{proxy.port}", **settings) as engine:
        replies = engine.generate(input_ids=IDS, max_new_tokens=3, ignore_eos=True)
        assert [len(reply.output_ids) for reply in replies] == [3, 3]
        assert list(engine.stream(IDS[0], max_new_tokens=3, ignore_eos=True))[-1].completion_tokens == 3


def test_weights_go_through_tls_with_a_key_in_the_requests(
    fake: FakeServer, proxy: TlsProxy, certificates: Path, tiny_llama_b: Path
) -> None:
    tensors = read_checkpoint(tiny_llama_b)
    client = ClientConfig(ca_certificate=str(certificates / "ca.pem"), api_key="open-sesame")
    pool = SGLangPool([SGLangClient(f"https://127.0.0.1:{proxy.port}", client)])
    with contextlib.closing(WeightSync(pool, SyncConfig(transport="http", verify="full"))) as sync:
        report = sync.push(tensors)
    assert report is not None
    assert all(torch.equal(fake.weights[0][name], tensor) for name, tensor in tensors.items())


def test_an_unknown_authority_and_a_wrong_name_are_refused_before_the_key_is_sent(
    fake: FakeServer, proxy: TlsProxy, certificates: Path
) -> None:
    before = len(fake.events)
    with pytest.raises(ServerUnreachableError, match=r"not trusted: .*pass its certificate as ca_certificate") as error:
        AsyncSGLang.connect(f"https://127.0.0.1:{proxy.port}", api_key="open-sesame")
    assert "open-sesame" not in str(error.value)
    with pytest.raises(ServerUnreachableError, match="the name in the URL must be one the certificate was made for"):
        AsyncSGLang.connect(f"https://localhost:{proxy.port}", ca_certificate=str(certificates / "ca.pem"))
    assert len(fake.events) == before


def test_https_to_an_http_server_is_named_as_the_cause(fake: FakeServer) -> None:
    with pytest.raises(ServerUnreachableError, match="does not speak TLS; is it http://"):
        AsyncSGLang.connect(fake.url.replace("http://", "https://"))


@pytest.mark.parametrize("content", [None, "not a certificate"])
def test_a_certificate_that_cannot_be_read_is_refused(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match="must be a PEM file"):
        AsyncSGLang.connect("https://127.0.0.1:9", ca_certificate=str(file))


def test_a_connection_that_breaks_after_the_request_is_not_taken_for_a_failed_handshake(
    fake: FakeServer, proxy: TlsProxy, certificates: Path
) -> None:
    """TLS adds an error to a broken connection; if that counted as a failed handshake, the request would be retried."""
    settings = {"ca_certificate": str(certificates / "ca.pem"), "api_key": "open-sesame"}
    with AsyncSGLang.connect(f"https://127.0.0.1:{proxy.port}", **settings) as engine:
        before = [event for event in fake.events if event["path"] == "/generate"]
        proxy.cut.set()
        with pytest.raises(ServerLostError, match="it may have run"):
            engine.generate(input_ids=IDS, max_new_tokens=3)
        assert len([event for event in fake.events if event["path"] == "/generate"]) <= len(before) + 1


def test_agents_sessions_speak_tls_with_the_same_authorities(proxy: TlsProxy, certificates: Path) -> None:
    from tests.agent_kit import run, user
    from torchrl_sglang import ClientConfig, SGLangClient, SGLangPool
    from torchrl_sglang.agents.served_model import ServedModel
    from torchrl_sglang.agents.server_calls import ServerCalls
    from torchrl_sglang.agents.sessions import Sessions
    from torchrl_sglang.agents.types import ChatRequest
    from torchrl_sglang.protocol.control import build_ready

    url = f"https://127.0.0.1:{proxy.port}"
    trusting = ClientConfig(ca_certificate=str(certificates / "ca.pem"), api_key="open-sesame")
    sessions = Sessions(ServedModel(SGLangPool([SGLangClient(url, trusting)])))
    request = ChatRequest(messages=(user("dog"),), sampling={"max_new_tokens": 3, "ignore_eos": True})
    for reports in (None, []):  # whole and streamed
        turn = run(sessions.create().chat(request, None if reports is None else reports.append))
        assert turn.completion_tokens == 3
    proxy.cut.set()  # the answer is lost, the server lives: generated again
    assert run(sessions.create().chat(request)).completion_tokens == 3
    run(sessions.close())
    with pytest.raises(ServerUnreachableError, match="is not trusted"):
        run(ServerCalls(SGLangClient(url)).send(build_ready()))
    with pytest.raises(ServerUnreachableError, match="does not speak TLS"):
        run(ServerCalls(SGLangClient(f"https://127.0.0.1:{proxy._target}")).send(build_ready()))
