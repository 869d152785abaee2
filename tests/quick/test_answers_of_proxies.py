"""What a proxy or ingress before a server does to requests: its own answers, its delays, and what it breaks off."""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch

from tests.fake_sglang import FakeServer
from tests.fake_sglang.model import read_checkpoint
from tests.ingress import HTML_502, Ingress, answer, chunks_cut_short, drip, reset_in_the_body
from torchrl_sglang import (
    ClientConfig,
    ProtocolError,
    RequestRejectedError,
    SamplingParams,
    ServerTimeoutError,
    SyncConfig,
    WeightSync,
    WeightUpdateError,
)
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.parallel import Task
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.control import build_pause

Make = Callable[..., FakeServer]
MakeIngress = Callable[..., Ingress]
PROMPTS = [[index + 3, 7, 8] for index in range(8)]
SHORT = SamplingParams(max_new_tokens=3, temperature=0, ignore_eos=True)
LOGIN = answer(200, "<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>")
ENDS_MUCH_EARLIER_S = 10.0
"""Than an answer that drips; on a machine with much else to do, too."""


@pytest.fixture
def ingress_of() -> Iterator[MakeIngress]:
    """``ingress_of(server, **settings)``: an ingress before a server, until the test ends."""
    with ExitStack() as open_:
        yield lambda server, **settings: open_.enter_context(Ingress(server.url, **settings))


def pool_of(*ingresses: Ingress, **client: float) -> SGLangPool:
    pool = SGLangPool([SGLangClient(each.url, ClientConfig(**client)) for each in ingresses])  # type: ignore[arg-type]
    pool.connect()
    return pool


def plain(pool: SGLangPool) -> list[list[int]]:
    return [reply.output_ids for reply in pool.generate(PROMPTS, SHORT)]


# ------------------------------------------------------------------------------------------------ 200, and a web page


def test_a_login_page_is_no_server(make: Make, ingress_of: MakeIngress) -> None:
    ingress = ingress_of(make())
    ingress.on("*", LOGIN)
    with pytest.raises(ProtocolError, match=r"answered /model_info with a web page \('Sign in'\)"):
        pool_of(ingress)


def test_a_web_page_is_no_reply(make: Make, ingress_of: MakeIngress) -> None:
    ingress = ingress_of(make())
    pool = pool_of(ingress)
    ingress.on("/generate", LOGIN)
    with pytest.raises(ProtocolError, match="answered /generate with a web page"):
        pool.generate(PROMPTS, SHORT)
    with pytest.raises(ProtocolError, match="answered /generate with a web page"):
        list(pool.stream(PROMPTS[0], SHORT))


@pytest.mark.parametrize("path", ["/pause_generation", "/update_weights_from_tensor", "/end_weight_update"])
def test_a_control_call_that_a_web_page_answers_has_not_succeeded(
    make: Make, ingress_of: MakeIngress, path: str
) -> None:
    server = make()
    ingress = ingress_of(server)
    tensors = {name: tensor + 1 for name, tensor in read_checkpoint(server.settings.model_path).items()}
    sync = WeightSync(pool_of(ingress), SyncConfig(verify="off", transport="http"))
    ingress.on(path, LOGIN, times=1)
    with pytest.raises(WeightUpdateError, match=f"answered {path} with a web page"):
        sync.push(tensors)
    ingress.clear()
    sync.push(tensors)
    assert all(torch.equal(server.weights[0][name], tensor) for name, tensor in tensors.items())
    sync.close()


def test_an_answer_is_read_as_json_though_a_proxy_has_changed_its_type(make: Make, ingress_of: MakeIngress) -> None:
    server = make()
    ingress = ingress_of(server)
    pool = pool_of(ingress)
    expected = plain(pool)
    body = json.dumps({"weight_version": "7@a1b2"})
    ingress.on("/model_info", answer(200, body, kind="application/octet-stream"))
    assert pool.clients[0].weight_version() == "7@a1b2"
    assert plain(pool) == expected


# ------------------------------------------------------------------------------------------------ statuses


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (408, "raise it, or send fewer prompts"),
        (413, "client_max_body_size"),
        (429, "limits the rate"),
        (502, "is gone, or is being restarted"),
        (503, "no server behind it"),
        (504, "proxy_read_timeout"),
    ],
)
def test_a_proxys_refusal_says_what_to_do_and_shows_no_markup(
    make: Make, ingress_of: MakeIngress, status: int, advice: str
) -> None:
    ingress = ingress_of(make())
    pool = pool_of(ingress)
    ingress.on("/generate", answer(status, f"<html><title>{status} Error</title><body>nginx</body></html>"), times=1)
    with pytest.raises(RequestRejectedError, match=f"proxy or an ingress before the server.*{advice}") as caught:
        pool.generate(PROMPTS, SHORT)
    assert caught.value.detail == f"{status} Error"
    assert "<" not in str(caught.value)
    assert pickle.loads(pickle.dumps(caught.value)).is_from_proxy
    assert len(plain(pool)) == 8


def test_the_servers_own_refusal_is_not_taken_for_a_proxys(make: Make, ingress_of: MakeIngress) -> None:
    ingress = ingress_of(make())
    pool = pool_of(ingress)
    full = json.dumps({"error": {"message": "The request queue is full."}})
    ingress.on("/generate", answer(503, full, kind="application/json"), times=1)
    with pytest.raises(RequestRejectedError, match="503 to /generate: The request queue is full.$") as caught:
        pool.generate(PROMPTS, SHORT)
    assert not caught.value.is_from_proxy


def test_prompts_that_may_have_been_generated_are_not_sent_again(make: Make, ingress_of: MakeIngress) -> None:
    ingress = ingress_of(make())
    pool = pool_of(ingress)
    ingress.seen.clear()
    ingress.on("/generate", answer(503, HTML_502, Retry_After="0"), times=1)
    with pytest.raises(RequestRejectedError, match="503 to /generate"):
        pool.generate(PROMPTS, SHORT)
    assert ingress.seen.count("/generate") == 1


def test_a_request_that_may_come_again_later_is_sent_again(make: Make, ingress_of: MakeIngress) -> None:
    ingress = ingress_of(make())
    pool = pool_of(ingress)
    expected = plain(pool)
    ingress.seen.clear()
    ingress.on("/generate", answer(429, HTML_502, Retry_After="0"), times=2)
    assert plain(pool) == expected
    assert ingress.seen.count("/generate") == 3


def test_a_request_that_may_come_again_too_late_is_refused_at_once(make: Make, ingress_of: MakeIngress) -> None:
    ingress = ingress_of(make())
    pool = pool_of(ingress)
    ingress.on("/generate", answer(429, HTML_502, Retry_After="3600"))
    start = time.monotonic()
    with pytest.raises(RequestRejectedError, match="it limits the rate"):
        pool.generate(PROMPTS, SHORT, timeout_s=60)
    assert time.monotonic() - start < 50


def test_a_control_call_that_may_have_run_is_not_sent_again(make: Make, ingress_of: MakeIngress) -> None:
    ingress = ingress_of(make())
    client = pool_of(ingress).clients[0]
    ingress.on("/pause_generation", answer(503, HTML_502, Retry_After="0"), times=1)
    with pytest.raises(RequestRejectedError, match="503 to /pause_generation"):
        client.send(build_pause("in_place"))
    ingress.on("/pause_generation", answer(429, HTML_502, Retry_After="0"), times=1)
    client.send(build_pause("in_place"))


def test_prompts_that_wait_for_a_server_that_leaves_are_generated_elsewhere_at_once(
    make: Make, ingress_of: MakeIngress
) -> None:
    server = make()
    ingress = ingress_of(make())
    pool = SGLangPool([SGLangClient(each.url) for each in (server, ingress)])
    pool.connect()
    ingress.on("/generate", answer(429, HTML_502, Retry_After="600"))
    generating = Task(lambda: pool.generate(PROMPTS, SHORT), name="generate")
    while "/generate" not in ingress.seen:
        time.sleep(0.01)
    pool.remove(ingress.url, drain=False)
    assert generating.wait(60)
    assert {reply.server for reply in generating.outcome().unwrap()} == {server.url}
    assert ingress.seen.count("/generate") == 1


def test_a_redirect_to_nowhere_is_no_success(make: Make, ingress_of: MakeIngress) -> None:
    ingress = ingress_of(make())
    client = pool_of(ingress).clients[0]
    ingress.on("/pause_generation", answer(302))
    with pytest.raises(RequestRejectedError, match="302 to /pause_generation.*SGLang answers no request so"):
        client.send(build_pause("in_place"))


def test_a_redirect_names_the_address_to_use(make: Make, ingress_of: MakeIngress) -> None:
    ingress = ingress_of(make())
    ingress.on("*", answer(301, Location="https://servers.example/model_info"))
    with pytest.raises(RequestRejectedError, match="it leads to https://servers.example/model_info: connect to the"):
        pool_of(ingress)


def test_what_a_server_that_died_behind_its_ingress_leaves_open_is_generated_elsewhere(
    make: Make, ingress_of: MakeIngress
) -> None:
    first, second = make(), make()
    one, two = ingress_of(first), ingress_of(second)
    pool = pool_of(one, two)
    expected = plain(pool)
    first.stop()
    assert plain(pool) == expected
    assert list(pool.quarantined) == [one.url]


# ------------------------------------------------------------------------------------------------ slow and half answers


def test_an_answer_that_drips_ends_with_the_time_out(make: Make, ingress_of: MakeIngress) -> None:
    ingress = ingress_of(make())
    pool = pool_of(ingress, control_timeout_s=1)
    ingress.on("/generate", drip(0.05))  # 100 s and more
    ingress.on("/pause_generation", drip(0.4))  # 70 s
    start = time.monotonic()
    with pytest.raises(ServerTimeoutError):
        pool.generate(PROMPTS, SHORT, timeout_s=1)
    with pytest.raises(ServerTimeoutError):
        pool.clients[0].send(build_pause("abort"))
    assert time.monotonic() - start < 2 + 2 * ENDS_MUCH_EARLIER_S


def test_a_time_out_ends_nothing_that_comes_later_on_the_same_connection(make: Make) -> None:
    client = SGLangClient(make().url, ClientConfig(probe_timeout_s=1.0))
    for _ in range(3):
        client.weight_version()
        time.sleep(0.5)


def test_a_stream_may_drip_between_two_events(make: Make, ingress_of: MakeIngress) -> None:
    ingress = ingress_of(make())
    pool = pool_of(ingress)
    *_, expected = pool.stream(PROMPTS[0], SHORT)
    ingress.on("/generate", drip(0.001))  # about two seconds in all
    *_, last = pool.stream(PROMPTS[0], SHORT, timeout_s=20)
    assert last.output_ids == expected.output_ids


@pytest.mark.parametrize("respond", [reset_in_the_body, chunks_cut_short])
def test_half_an_answer_is_none_and_the_server_stays(
    make: Make, ingress_of: MakeIngress, respond: Callable[[], object]
) -> None:
    ingress = ingress_of(make())
    pool = pool_of(ingress)
    ingress.on("/generate", respond(), times=1)  # type: ignore[arg-type]
    with pytest.raises(ProtocolError, match="sent half a reply"):
        pool.generate(PROMPTS, SHORT)
    assert not pool.quarantined
    assert len(plain(pool)) == 8


# ------------------------------------------------------------------------------------------------ addresses


def test_servers_below_paths_of_one_address_generate_and_take_weights(make: Make, ingress_of: MakeIngress) -> None:
    servers = make(), make()
    first, second = (ingress_of(server, prefix=f"/replica-{index}") for index, server in enumerate(servers))
    pool = pool_of(first, second)
    tensors = {name: tensor + 1 for name, tensor in read_checkpoint(servers[0].settings.model_path).items()}
    sync = WeightSync(pool, SyncConfig(verify="off"))
    assert sync.push(tensors) is not None
    for server in servers:
        assert all(torch.equal(server.weights[0][name], tensor) for name, tensor in tensors.items())
    pool.remove(f"{second.url}/")
    pool.add(f"{second.url}/")
    assert {reply.server for reply in pool.generate(PROMPTS, SHORT)} == {first.url, second.url}
    sync.close()


def test_a_server_at_an_ipv6_address_generates_and_takes_weights_over_http(make: Make, ingress_of: MakeIngress) -> None:
    server = make()
    ingress = ingress_of(server, host="::1")
    assert ingress.url.startswith("http://[::1]:")
    pool = pool_of(ingress)
    tensors = {name: tensor + 1 for name, tensor in read_checkpoint(server.settings.model_path).items()}
    sync = WeightSync(pool, SyncConfig(verify="off", transport="http"))
    assert sync.push(tensors) is not None
    assert len(plain(pool)) == 8
    sync.close()


def test_a_proxy_in_the_environment_is_not_used(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    pool = SGLangPool([SGLangClient(make().url)])
    assert len(plain(pool)) == 8
