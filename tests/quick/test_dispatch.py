"""Requests of bounded size, and what is taken for the death of a server."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.fake_sglang import FakeServer, FakeSettings, Fault
from torchrl_sglang import ConfigError, SamplingParams, ServerLostError, ServerTimeoutError, ServerUnreachableError
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.errors import SGLangError
from torchrl_sglang.parallel import work_through
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.pool.dispatch import dead_server, dispatch_shares
from torchrl_sglang.protocol.messages import GenerateReply

ONE, TWO = SGLangClient("http://127.0.0.1:1"), SGLangClient("http://127.0.0.1:2")


class Sender:
    """Answers requests in memory, and keeps count."""

    def __init__(self, fail: dict[str, SGLangError] | None = None) -> None:
        self.fail = fail or {}
        self.sizes: list[int] = []
        self.running: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.lock = threading.Lock()

    def __call__(self, client: SGLangClient, part: Sequence[int]) -> list[GenerateReply]:
        with self.lock:
            self.sizes.append(len(part))
            self.running[client.url] += 1
            self.most[client.url] = max(self.most[client.url], self.running[client.url])
        time.sleep(0.01)
        with self.lock:
            self.running[client.url] -= 1
        if client.url in self.fail:
            raise self.fail[client.url]
        return [GenerateReply(output_ids=[index]) for index in part]


def test_a_large_share_is_sent_in_requests_of_256_sequences_eight_at_a_time_per_server() -> None:
    send = Sender()
    share = list(range(5000))
    result = dispatch_shares([(ONE, share[::2]), (TWO, share[1::2])], 1, send, lambda client, error: None)
    assert sorted(result.replies) == share
    assert all(result.replies[index][0].output_ids == [index] for index in share)
    assert max(send.sizes) == 256
    assert len(send.sizes) == 20
    assert max(send.most.values()) <= 8


def test_the_sequences_of_one_prompt_stay_in_one_request() -> None:
    sizes = []

    def send(client: SGLangClient, part: Sequence[int]) -> list[GenerateReply]:
        sizes.append(len(part))
        return [GenerateReply(output_ids=[index, i]) for index in part for i in range(100)]

    result = dispatch_shares([(ONE, [4, 5, 6, 7, 8])], 100, send, lambda client, error: None)
    assert sorted(sizes) == [1, 2, 2]  # 200 sequences
    assert [reply.output_ids for reply in result.replies[7]] == [[7, i] for i in range(100)]


def test_what_waits_for_a_server_that_died_is_lost_without_being_sent() -> None:
    death = ServerLostError("gone", server=ONE.url)
    send = Sender(fail={ONE.url: death})
    share = list(range(256 * 20))
    result = dispatch_shares([(ONE, share), (TWO, [9000])], 1, send, lambda client, error: client)
    assert sorted(index for part, _, _ in result.lost for index in part) == share
    assert {url for _, url, _ in result.lost} == {ONE.url}
    assert list(result.replies) == [9000]
    ran = [error for _, _, error in result.lost if error is death]
    never_ran = [error for _, _, error in result.lost if isinstance(error, ServerUnreachableError)]
    assert len(ran) + len(never_ran) == 20
    assert 1 <= len(ran) <= 8  # those under way when it died


def test_after_an_error_nothing_more_is_sent() -> None:
    send = Sender(fail={ONE.url: ServerTimeoutError("late", server=ONE.url)})
    result = dispatch_shares([(ONE, list(range(256 * 50)))], 1, send, lambda client, error: None)
    assert isinstance(result.failure, ServerTimeoutError)
    assert len(send.sizes) <= 8


def test_work_through_raises_what_is_no_error_of_this_package() -> None:
    with pytest.raises(ZeroDivisionError):
        work_through([[lambda: 1 // 0, lambda: 1]], workers=2)


def test_a_server_that_answers_again_is_not_dead_and_gets_the_request_once_more() -> None:
    tries = []

    def send(client: SGLangClient, part: Sequence[int]) -> list[GenerateReply]:
        tries.append(part)
        if len(tries) == 1:
            raise ServerUnreachableError("no connection", server=client.url)
        return [GenerateReply(output_ids=[index]) for index in part]

    result = dispatch_shares([(ONE, [3])], 1, send, lambda client, error: None)
    assert result.replies[3][0].output_ids == [3]
    assert not result.lost


def test_a_failure_of_this_machine_is_no_death_of_the_server(tiny_llama: Path) -> None:
    local = ServerUnreachableError("no descriptor", server=ONE.url, is_local=True)
    assert dead_server(ONE, local) is None
    assert dead_server(ONE, ServerUnreachableError("refused", server=ONE.url)) is ONE  # nothing listens there
    with FakeServer(FakeSettings(model_path=tiny_llama)) as fake:
        alive = SGLangClient(fake.url)
        assert dead_server(alive, ServerUnreachableError("refused", server=fake.url)) is None
        assert dead_server(alive, ServerLostError("broken", server=fake.url)) is None
        send_fails = Sender(fail={alive.url: local})
        result = dispatch_shares([(alive, [0])], 1, send_fails, dead_server)
        assert result.failure is local


def test_a_time_out_of_a_batch_counts_for_all_its_requests_together(tiny_llama: Path) -> None:
    with FakeServer(FakeSettings(model_path=tiny_llama)) as fake:
        fake.arm(Fault(path="/generate", action="slow", seconds=0.7, times=0))
        pool = SGLangPool([SGLangClient(fake.url)])
        prompts = [[1, 2]] * (256 * 40)
        with pytest.raises(ServerTimeoutError):
            pool.generate(prompts, SamplingParams(max_new_tokens=1), timeout_s=1.5)
        # Each of the forty would be answered within 1.5 s of its own.
        assert sum(event["path"] == "/generate" for event in fake.events) < 40
        with pytest.raises(ConfigError, match="timeout_s must be"):
            pool.generate([[1, 2]], SamplingParams(max_new_tokens=1), timeout_s=-1)
