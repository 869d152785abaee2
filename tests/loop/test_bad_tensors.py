"""A launched server answers tensors that it can't read or load; without the package's plugin SGLang's process ends."""

from __future__ import annotations

import base64
import pickle

import pytest
import torch

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SamplingParams
from torchrl_sglang.errors import RequestRejectedError
from torchrl_sglang.protocol.control import (
    build_begin_update,
    build_continue,
    build_end_update,
    build_pause,
    build_update_from_tensors,
)
from torchrl_sglang.protocol.generate import build_generate, parse_generate
from torchrl_sglang.server import SGLangServer


def payload(named: object) -> str:
    return base64.b64encode(pickle.dumps(named)).decode()


BAD = [
    pytest.param(base64.b64encode(b"no pickle").decode(), "read the tensors", id="not a pickle"),
    pytest.param(payload(print), "read the tensors", id="a function that is not on the allow-list"),
    pytest.param(payload([("model.norm.weight", torch.zeros(3))]), "load the tensors", id="another shape"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_a_server_answers_tensors_that_it_cannot_read_or_load_and_lives_on(
    pristine_server: SGLangServer, text: str, message: str
) -> None:
    client = SGLangClient(pristine_server.url)
    client.connect()
    client.send(build_pause("abort"))
    client.send(build_begin_update())
    with pytest.raises(RequestRejectedError, match=message):
        client.send(build_update_from_tensors([text], flush_cache=False))
    client.send(build_end_update())
    client.send(build_continue())
    request = build_generate([[1, 2, 3]], SamplingParams(max_new_tokens=2))
    (reply,) = parse_generate(client.send(request), num_expected=1, server=client.url)
    assert len(reply.output_ids) == 2
