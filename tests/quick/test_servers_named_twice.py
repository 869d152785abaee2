"""One server under two URLs is found where it can be; servers behind one address are not taken for one."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fake_sglang import FakeServer
from tests.ingress import Ingress
from torchrl_sglang import AsyncSGLang, ConfigError
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import ServerListFollower, SGLangPool
from torchrl_sglang.pool.balanced_addresses import refuse_balanced_address
from torchrl_sglang.pool.checks import refuse_same_server
from torchrl_sglang.pool.server_list import reader_of
from torchrl_sglang.protocol.messages import ServerInfo

Make = Callable[..., FakeServer]


def test_a_pool_is_not_made_of_one_server_under_two_names(make: Make) -> None:
    url = make().url
    with pytest.raises(ConfigError, match="is a server of this pool already, under the name"):
        AsyncSGLang.connect([url, url.replace("127.0.0.1", "localhost")])


def info(url: str, seed: int, start_s: float | None = None) -> ServerInfo:
    raw: dict[str, Any] = {"random_seed": seed}
    if start_s is not None:
        raw["startup_time"] = {"scheduler_e2e": start_s}
    return ServerInfo(url=url, model_path="m", tokenizer_path="m", version="0.5.23", tp_size=1, raw=raw)


@pytest.mark.parametrize(
    ("other", "seed", "start_s", "is_same"),
    [
        ("https://b.example", 2, None, False),  # an ingress has one address for many names
        ("https://a.example/second", 1, None, False),  # or for many paths
        ("https://b.example", 1, 7.2200001, False),  # all started with one --random-seed
        ("https://b.example", 1, None, True),
        ("https://b.example", 1, 7.22, True),
    ],
)
def test_servers_behind_one_address_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, other: str, seed: int, start_s: float | None, is_same: bool
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", ("10.0.0.1", 443))])
    members, new = [info("https://a.example", 1, None if start_s is None else 7.22)], [info(other, seed, start_s)]
    if not is_same:
        refuse_same_server(new, members)
        return
    with pytest.raises(ConfigError, match=r"b\.example is a server of this pool already.*a\.example.*--random-seed"):
        refuse_same_server(new, members)


def test_a_name_with_addresses_of_both_families_stands_for_each_server_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ["fd00::1", "10.0.0.1"]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", (each, 80)) for each in found])
    assert reader_of("dns://servers.example:80")() == ["http://10.0.0.1:80"]
    found.remove("10.0.0.1")
    assert reader_of("dns://servers.example:80")() == ["http://[fd00::1]:80"]


@pytest.mark.parametrize("wrong", [None, 5, b"http://a:1", Path("a")])
def test_what_names_no_servers_is_refused(make: Make, wrong: Any) -> None:
    pool = SGLangPool([SGLangClient(make().url)])
    for change in (pool.add, pool.remove, AsyncSGLang(pool).remove):
        with pytest.raises(ConfigError, match="servers are named by a URL"):
            change(wrong)


def test_servers_may_be_named_by_any_iterable(make: Make) -> None:
    engine = AsyncSGLang.connect(make().url)
    second, third = make().url, make().url
    assert set(engine.add({second, third})) == {second, third}
    engine.remove(url for url in (second, third))
    assert len(engine.pool.clients) == 1
    with pytest.raises(ConfigError, match="drain must be True or False"):
        engine.remove(second, drain="no")  # type: ignore[arg-type]


def test_a_copy_of_a_pool_follows_no_list(make: Make) -> None:
    import copy

    url = make().url
    with pytest.raises(ConfigError, match="this pool is a copy"):
        ServerListFollower(copy.copy(AsyncSGLang.connect(url).pool), lambda: [url])


def test_an_address_that_leads_to_several_servers_is_refused(make: Make) -> None:
    servers = itertools.cycle([make().url, make().url])

    class Balanced(Ingress):
        def _forward(self, *request: Any) -> Any:
            self.backend = next(servers)
            return super()._forward(*request)

    with Balanced("") as balancer:
        client = SGLangClient(balancer.url)
        client.connect()
        with pytest.raises(ConfigError, match=f"{balancer.url} leads to several servers.*follow"):
            refuse_balanced_address(client)
    with Ingress(make().url) as ingress:
        client = SGLangClient(ingress.url)
        client.connect()
        refuse_balanced_address(client)
