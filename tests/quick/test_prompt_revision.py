"""A server started with ``--revision`` has that revision's tokenizer, template, settings and tensors: so do we."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from tests.tokenizers_made import make_tokenizer
from torchrl_sglang import AsyncSGLang, ConfigError, ServerConfig, SGLangWrapper, SyncConfig
from torchrl_sglang.chat import SGLangChat
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.model_files import find_model_file, load_tokenizer, read_vocab_size
from torchrl_sglang.pool.checks import refuse_different_models
from torchrl_sglang.pool.end_tokens import EndTokens
from torchrl_sglang.server.model_check import refuse_unsupported_model
from torchrl_sglang.weights.checkpoint.headers import Checkpoint
from torchrl_sglang.weights.planning import PushPlanner

NAME = "org/model"
WIDTHS = {"main": 4, "B": 6}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds one model in two revisions, which differ in every file."""
    folder = tmp_path / "models--org--model"
    for number, (revision, width) in enumerate(WIDTHS.items()):
        commit = str(number) * 40
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / revision).write_text(commit)
        files = folder / "snapshots" / commit
        files.mkdir(parents=True)
        make_tokenizer("byte-level", chat_template=f"template of {revision}").save_pretrained(files)
        kind = "llama" if revision == "main" else "deepseek_v3"
        (files / "config.json").write_text(
            json.dumps({"vocab_size": 400 + width, "model_type": kind, "eos_token_id": width})
        )
        (files / "generation_config.json").write_text(json.dumps({"temperature": width / 10}))
        save_file({"w": torch.zeros(width)}, files / "model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """``serve(**fields)``: the URL of something that answers like a server with these fields in ``/server_info``."""
    running = []

    def start(**fields: Any) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answers = {
                    "/model_info": {"model_path": NAME, "tokenizer_path": NAME, "weight_version": "default"},
                    "/server_info": {"version": "0.5.23", "max_req_input_len": 100, **fields},
                }
                body = json.dumps(answers.get(self.path, {})).encode()
                self.send_response(200 if self.path in answers else 405)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("asked", [None, "main", "B", "1" * 40])
def test_everything_that_is_read_is_of_the_servers_revision(
    hub: Path, serve: Callable[..., str], asked: str | None
) -> None:
    revision = "main" if asked in (None, "main") else "B"
    url, width = serve(revision=asked), WIDTHS[revision]
    with AsyncSGLang.connect(url) as engine:
        assert engine.pool.info.revision == asked
        assert engine.pool.vocab_size == 400 + width
        assert engine.tokenizer.chat_template == f"template of {revision}"
        assert engine.weights.get_model_metadata()["w"][1] == (width,)
        planner = PushPlanner(engine.pool, SyncConfig(), "me", None)
        assert planner.checkpoint.specs["w"].shape == (width,)
    chat = SGLangChat(url)
    assert chat.tokenizer.chat_template == f"template of {revision}"
    assert chat._defaults.sampling({}, prompt_length=1, context_length=50).temperature == width / 10
    assert SGLangWrapper(url).tokenizer.chat_template == f"template of {revision}"
    assert chat._tool_calls.parser == (None if revision == "main" else "deepseekv3")
    with pytest.raises(ConfigError, match=rf"eos_token_id in config.json \({width}\)"):
        EndTokens().check(chat.pool.info, vocab_size=1)
    assert SGLangChat(url, min_new_tokens=90)._defaults.given == {"min_new_tokens": 90}
    with pytest.raises(ConfigError, match="min_new_tokens"):
        SGLangChat(url, min_new_tokens=200)


def test_a_revision_that_is_not_here_is_named(hub: Path) -> None:
    assert find_model_file(NAME, "config.json", "C") is None
    assert read_vocab_size(NAME, "C") is None
    with pytest.raises(ConfigError, match="org/model at revision C is neither"):
        Checkpoint.read(NAME, revision="C")
    with pytest.raises(ConfigError, match="'org/model' at revision 'C' can't be loaded"):
        load_tokenizer(NAME, "C")


def test_a_server_is_launched_for_the_revision_that_was_checked(hub: Path) -> None:
    config = hub / "models--org--model" / "snapshots" / ("1" * 40) / "config.json"
    unsupported = {"architectures": ["Qwen3MoeForCausalLM"], "mlp_only_layers": [0], "num_hidden_layers": 2}
    config.write_text(json.dumps({**json.loads(config.read_text()), **unsupported}))
    refuse_unsupported_model(ServerConfig(model=NAME), cpu=True)
    for words in (("--revision", "B"), ("--revision=B",)):
        with pytest.raises(ConfigError, match="does not compute"):
            refuse_unsupported_model(ServerConfig(model=NAME, extra_args=words), cpu=True)


def test_a_folder_has_one_revision(hub: Path) -> None:
    folder = hub / "models--org--model" / "snapshots" / ("0" * 40)
    assert load_tokenizer(str(folder), "B").chat_template == "template of main"
    assert Checkpoint.read(folder, revision="B").specs["w"].shape == (4,)


def test_servers_of_two_revisions_are_not_one_pool(hub: Path, serve: Callable[..., str]) -> None:
    infos = [SGLangClient(serve(revision=revision)).connect() for revision in ("B", "1" * 40)]
    refuse_different_models(infos[:1])
    with pytest.raises(ConfigError, match="serves revision B of 'org/model'.*1111"):
        refuse_different_models(infos)
