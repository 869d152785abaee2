"""A stream on a server that leaves the pool while another one joins at the same address."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.fake_sglang import FakeServer, Fault
from torchrl_sglang import SamplingParams, ServerError, ServerLostError
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool, draining
from torchrl_sglang.pool.stream_run import StreamRun

LONG = SamplingParams(max_new_tokens=60, temperature=0, ignore_eos=True)


def test_the_new_server_is_not_blamed_for_it(make: Callable[..., FakeServer], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = make(step_s=0.02), make(step_s=0.02)
    pool = SGLangPool([SGLangClient(server.url) for server in (first, second)])
    pool.connect()
    record = StreamRun._record_failure
    joined: list[SGLangClient] = []

    def after_it_has_joined_again(self: StreamRun, client: SGLangClient, error: Any, **given: Any) -> None:
        if not joined:
            joined.append(client)
            pool.add(client.url)
        record(self, client, error, **given)

    monkeypatch.setattr(draining, "_ABORT_TIMEOUT_S", 0.1)
    for server in (first, second):
        server.arm(Fault(path="/abort_request", action="refuse"))  # so the connection of the stream is broken
    monkeypatch.setattr(StreamRun, "_record_failure", after_it_has_joined_again)
    stream = pool.stream([1, 2, 3], LONG)
    left = next(stream).server
    pool.remove(left, drain=False)
    with pytest.raises(ServerError, match="was removed from the pool: ask again") as caught:
        list(stream)
    assert not isinstance(caught.value, ServerLostError)
    assert [client.url for client in joined] == [left]
    assert not pool.quarantined
    assert {client.url for client in pool.healthy} == {first.url, second.url}
