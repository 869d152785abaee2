"""A real server in whose place another one is started between two requests of a pool without synced weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from torchrl_sglang import SamplingParams, ServerError, SGLangServer
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.pool.checks import process_mark
from torchrl_sglang.protocol.dialect import SERVER_INFO

SHORT = SamplingParams(max_new_tokens=4, temperature=0, ignore_eos=True)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["current", "old"])
def test_another_model_gets_no_request(
    launch_server: Callable[..., SGLangServer], tiny_llama_b: Path, version: str, request: pytest.FixtureRequest
) -> None:
    settings = {"env": request.getfixturevalue("old_sglang_env")} if version == "old" else {}
    server = launch_server(api_key=False, **settings)
    pool = SGLangPool([SGLangClient(server.url)])
    pool.connect()
    pool.generate([[1, 2, 3]], SHORT)
    mark = process_mark(pool.info.raw)
    assert mark is not None
    assert process_mark(pool.clients[0].send(SERVER_INFO)) == mark, "it changes while the process runs"
    server.stop(kill=True)
    launch_server(model=str(tiny_llama_b), port=urlsplit(server.url).port, api_key=False, **settings)
    with pytest.raises(ServerError, match="has come back with another checkpoint"):
        pool.generate([[1, 2, 3]], SHORT)
    pool.close()
