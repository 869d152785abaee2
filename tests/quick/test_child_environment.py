"""Children reach local addresses past a proxy, and don't import modules of the working directory."""

from __future__ import annotations

import pytest
from requests.utils import should_bypass_proxies

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import ServerConfig
from torchrl_sglang.server.environment import child_environment, inherited_environment, router_environment

PROXY = "http://proxy.example:3128"


def server(parent: dict[str, str], **settings: object) -> dict[str, str]:
    config = ServerConfig(model="m", device="cpu", **settings)  # type: ignore[arg-type]
    return child_environment(config, parent, cpu=True, same_python=True)


def bypasses(variables: dict[str, str], url: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, variables[name])
    return bool(should_bypass_proxies(url, None))


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"])
def test_local_addresses_are_reached_past_every_kind_of_proxy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = server({name: PROXY})
    assert variables[name] == PROXY, "a server still downloads models and images through the proxy"
    for url in ("http://127.0.0.1:30000/x", "http://localhost:30000", "http://127.3.2.1:1", "http://[::1]:30000"):
        assert bypasses(variables, url, monkeypatch), url
    assert not bypasses(variables, "http://hub.example/x", monkeypatch)


def test_addresses_that_were_listed_stay_and_both_spellings_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = server({"HTTP_PROXY": PROXY, "no_proxy": "a.example", "NO_PROXY": "b.example, a.example"})
    assert variables["no_proxy"] == variables["NO_PROXY"]
    for url in ("http://a.example", "http://b.example", "http://127.0.0.1:1"):
        assert bypasses(variables, url, monkeypatch), url
    assert server({"HTTP_PROXY": PROXY, "NO_PROXY": "*"})["NO_PROXY"] == "*"
    assert "NO_PROXY" not in server({"HTTP_PROXY": ""})
    own = server({}, env={"http_proxy": PROXY, "no_proxy": "mine.example"})
    assert bypasses(own, "http://mine.example", monkeypatch)
    assert bypasses(own, "http://127.0.0.1:1", monkeypatch)


def test_a_server_on_all_interfaces_reaches_itself_by_its_outward_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchrl_sglang.server.environment.outward_address", lambda host: "10.9.8.7")
    assert bypasses(server({"HTTP_PROXY": PROXY}, host="0.0.0.0"), "http://10.9.8.7:30000", monkeypatch)
    assert bypasses(server({"HTTP_PROXY": PROXY}, host="10.1.1.1"), "http://10.1.1.1:30000", monkeypatch)


def test_a_router_has_no_proxy_for_its_servers_and_keeps_that_for_downloads() -> None:
    parent = {"HTTP_PROXY": PROXY, "http_proxy": PROXY, "HTTPS_PROXY": "http://other", "ALL_PROXY": PROXY, "HOME": "/h"}
    variables = router_environment(parent, "127.0.0.1")
    assert not variables.keys() & {"HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"}
    assert (variables["HTTPS_PROXY"], variables["HOME"]) == ("http://other", "/h")
    assert router_environment({"all_proxy": PROXY}, "127.0.0.1")["HTTPS_PROXY"] == PROXY


def test_the_working_directory_is_not_on_a_childs_path_and_the_users_path_is() -> None:
    assert server({})["PYTHONSAFEPATH"] == "1"
    assert router_environment({}, "127.0.0.1")["PYTHONSAFEPATH"] == "1"
    assert inherited_environment({"PYTHONPATH": ":/mine::./lib:"})["PYTHONPATH"] == "/mine:./lib"
    assert "/mine" in server({"PYTHONPATH": ":/mine"})["PYTHONPATH"].split(":")
    assert server({}, env={"PYTHONSAFEPATH": ""})["PYTHONSAFEPATH"] == ""


def test_this_packages_own_requests_use_no_proxy() -> None:
    session = SGLangClient("127.0.0.1:9")._connections.session("control")
    assert session.merge_environment_settings("http://127.0.0.1:9", {}, None, None, None)["proxies"] == {}
