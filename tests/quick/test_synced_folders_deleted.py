"""Servers whose weights came from a shared folder that was deleted since: a new trainer connects and sends its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fake_sglang import FakeServer
from tests.fake_sglang.model import read_checkpoint
from torchrl_sglang import ConfigError, SamplingParams, SyncConfig, WeightSync
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.pool.checks import refuse_different_models
from torchrl_sglang.protocol.messages import ServerInfo


@pytest.mark.filterwarnings("ignore:.*holds weights of an earlier run")
def test_a_new_trainer_uses_servers_that_name_a_deleted_folder_as_their_model(
    make: Callable[..., FakeServer], tiny_llama: Path, tmp_path: Path
) -> None:
    servers = [make(), make()]
    tensors = read_checkpoint(tiny_llama)
    before = WeightSync(
        SGLangPool([SGLangClient(servers[0].url)]), SyncConfig(transport="disk", disk_dir=tmp_path, verify="off")
    )
    before.push(tensors)
    before.close()
    (folder,) = tmp_path.iterdir()
    assert SGLangClient(servers[0].url).info.model_path == str(folder)
    shutil.rmtree(folder)
    for order in (servers, servers[::-1], servers[:1]):
        pool = SGLangPool([SGLangClient(server.url) for server in order])
        pool.connect()
        assert pool.vocab_size == 320
        assert pool.info.model_path == str(tiny_llama)
        sync = WeightSync(pool, SyncConfig(verify="off"))
        report = sync.push(tensors)
        assert report is not None
        assert len(pool.generate([[1, 2]] * 2, SamplingParams(max_new_tokens=1))) == 2
        sync.close()


def test_a_vocabulary_that_can_not_be_read_here_is_no_other_model() -> None:
    def info(name: str, vocab_size: int | None, architecture: str = "L") -> ServerInfo:
        return ServerInfo(
            url=f"http://{name}:1",
            version="0.5.23",
            model_path="/nowhere",
            tokenizer_path="/nowhere",
            vocab_size=vocab_size,
            architectures=(architecture,),
        )

    refuse_different_models([info("a", None), info("b", 320), info("c", 320), info("d", None)])
    for wrong in ([info("a", None), info("b", 320), info("c", 321)], [info("a", None), info("b", None, "M")]):
        with pytest.raises(ConfigError, match="one pool needs servers of one model"):
            refuse_different_models(wrong)
