"""Keys: made for launched servers, read from files, and shown nowhere."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from tests.fake_sglang import FakeServer
from tests.fake_sglang.model import read_checkpoint
from torchrl_sglang import (
    AsyncSGLang,
    ClientConfig,
    ConfigError,
    RequestRejectedError,
    SamplingParams,
    ServerConfig,
    SGLangError,
)
from torchrl_sglang.cli import main
from torchrl_sglang.doctor import Diagnosis, check_server
from torchrl_sglang.engine.launching import client_config, server_configs
from torchrl_sglang.hydra_configs import close_engines, shared_engine
from torchrl_sglang.recipes.setup.config import Arguments, load_config, save_config
from torchrl_sglang.server.command import build_command, check_config, keys_as_yaml

KEY = "correct-horse"
ADMIN = "battery-staple"
RECIPE = Path(__file__).resolve().parents[2] / "examples" / "grpo.py"
RECORDS = [ClientConfig, lambda **given: ServerConfig(model="m", **given)]


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text(f"{KEY}\n")
    return path


def launch_configs(**given: Any) -> tuple[ServerConfig, ...]:
    return server_configs("m", tp_size=1, dp_size=2, gpus=None, given=given)


# ---------------------------------------------------------------------------------------------------- what servers get


def test_launched_servers_share_a_random_key_that_clients_are_told() -> None:
    first, second = launch_configs()
    assert isinstance(first.api_key, str)
    assert len(first.api_key) == 64
    assert first.api_key == second.api_key != launch_configs()[0].api_key
    assert client_config(None, first).api_key == first.api_key


def test_a_key_of_ones_own_or_none_at_all_can_be_asked_for(key_file: Path) -> None:
    assert {config.api_key for config in launch_configs(api_key="mine")} == {"mine"}
    assert {config.api_key for config in launch_configs(api_key_file=str(key_file))} == {KEY}
    (*_, is_open) = launch_configs(api_key=False)
    assert keys_as_yaml(is_open) is None
    assert client_config(None, is_open).api_key is None


def test_a_clients_key_that_the_servers_do_not_have_is_refused() -> None:
    (config, _) = launch_configs()
    with pytest.raises(ConfigError, match="client has an api_key, which launched servers don't have"):
        client_config(ClientConfig(api_key=KEY), config)
    (config, _) = launch_configs(api_key=KEY)
    assert client_config(ClientConfig(api_key=KEY), config).api_key == KEY


def test_an_admin_key_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="admin_api_key without api_key") as refused:
        ServerConfig(model="m", admin_api_key=ADMIN)
    assert ADMIN not in str(refused.value)
    with pytest.raises(ConfigError, match="admin_api_key without api_key"):
        launch_configs(admin_api_key=ADMIN, api_key=False)
    (config, _) = launch_configs(admin_api_key=ADMIN)  # an engine makes the other key
    assert isinstance(config.api_key, str)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.7", "node-7"])
def test_a_server_for_other_machines_needs_a_key_or_a_word_that_it_needs_none(tiny_llama: Path, host: str) -> None:
    config = ServerConfig(model=str(tiny_llama), host=host)
    with pytest.raises(ConfigError, match="api_key=False launches it without a key"):
        check_config(config)
    for key in (KEY, False):
        check_config(replace(config, api_key=key))
    for loopback in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        check_config(replace(config, host=loopback))


def test_serve_refuses_other_machines_without_a_key(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tiny_llama), "--host", "0.0.0.0"]) == 2
    assert "give --api-key-file FILE. --no-api-key serves everyone" in capsys.readouterr().err
    no_python = ["--python", "/no/python"]  # the next thing that is checked
    assert main(["serve", str(tiny_llama), "--host", "0.0.0.0", "--no-api-key", *no_python]) == 2
    assert "not an executable file" in capsys.readouterr().err
    assert main(["serve", str(tiny_llama), *no_python]) == 2
    assert "not an executable file" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- files and YAML


@pytest.mark.parametrize("record", RECORDS)
def test_a_key_file_is_read_once(record: Callable[..., Any], key_file: Path) -> None:
    config = record(api_key_file=key_file)
    key_file.unlink()
    for made in (config, replace(config), pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert made.api_key == KEY
        assert KEY not in repr(made)
    with pytest.raises(ConfigError, match="give api_key or api_key_file, not both"):
        record(api_key=KEY, api_key_file=key_file)


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "can't be read: No such file"),
        (b" \n", "is empty"),
        (b"\xff\xfe", "is no text"),
        (b"a\nb", "white space"),
    ],
)
def test_a_bad_key_file_is_refused(record: Any, tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        record(api_key_file=path)
    with pytest.raises(ConfigError, match="can't be read: Is a directory"):
        record(api_key_file=tmp_path)


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("name", ["api_key", "admin_api_key"])
@pytest.mark.parametrize(
    "key", ["", "-secret", "two secrets", "secret\n", "secret\tb", "sécret", 20261126, b"secret", True]
)
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(record: Any, name: str, key: object) -> None:
    with pytest.raises(ConfigError, match=f"{name} must") as refused:
        record(**{"api_key": KEY, name: key})
    shown = "".join(traceback.format_exception(refused.value, limit=0))
    assert "secret" not in shown
    assert "20261126" not in shown


@pytest.mark.parametrize("word", ["--api-key", "--api-k", "--admin-api", "--admin-api-key=x"])
def test_a_key_in_extra_args_is_refused_however_it_is_spelled(word: str) -> None:
    """argparse takes every unambiguous beginning of a flag."""
    with pytest.raises(ConfigError, match="must not be in extra_args"):
        ServerConfig(model="m", extra_args=(word, "x"))


def test_sglangs_settings_file_and_the_keys_become_one_file(tiny_llama: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("schedule-policy: fcfs\nlora-paths: [a, b]\n")
    words = ("--log-level", "info", "--config", str(mine), "--sleep-on-idle")
    config = ServerConfig(model=str(tiny_llama), api_key=KEY, extra_args=words)
    check_config(config)
    assert yaml.safe_load(keys_as_yaml(config) or "") == {
        "schedule-policy": "fcfs",
        "lora-paths": ["a", "b"],
        "api-key": KEY,
    }
    command = build_command(config, port=1, rendezvous_port=2, cpu=True, key_file=Path("keys.yaml"))
    assert command.count("--config") == 1
    assert command[command.index("--config") + 1] == "keys.yaml"
    assert command[-3:] == ["--log-level", "info", "--sleep-on-idle"]
    without = replace(config, api_key=None)
    assert keys_as_yaml(without) is None
    assert str(mine) in build_command(without, port=1, rendezvous_port=2, cpu=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"api-key: {KEY}", "holds api_key, which clients need too: use api_key_file="),
        (f"admin_api_key: {KEY}", "use admin_api_key_file="),
        ("- a", "holds no settings"),
        ("{", "can't be read"),
        (None, "can't be read"),
    ],
)
def test_a_settings_file_that_can_not_be_used_is_refused(
    tiny_llama: Path, tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_text(content)
    for key in (None, KEY):
        with pytest.raises(ConfigError, match=message) as refused:
            check_config(ServerConfig(model=str(tiny_llama), api_key=key, extra_args=("--config", str(path))))
        assert KEY not in str(refused.value)
    with pytest.raises(ConfigError, match="SGLang takes one"):
        check_config(ServerConfig(model=str(tiny_llama), extra_args=("--config",)))


def test_a_recipe_takes_the_file_and_refuses_the_key(key_file: Path, tmp_path: Path) -> None:
    for node in ("engine.api_key", "+engine.admin_api_key"):
        with pytest.raises(ConfigError, match=f"set {node.lstrip('+')}_file to its path") as refused:
            load_config(RECIPE, Arguments(overrides=(f"{node}={KEY}",)))
        assert KEY not in str(refused.value)
    words = (f"engine.api_key_file={key_file}", "engine.url=http://127.0.0.1:1", f"run.folder={tmp_path / 'run'}")
    config = load_config(RECIPE, Arguments(overrides=words))
    save_config(config, tmp_path)
    saved = (tmp_path / "config.yaml").read_text()
    assert KEY not in saved
    assert OmegaConf.create(saved).engine.api_key_file == str(key_file)
    assert load_config(RECIPE, Arguments(overrides=("engine.api_key=false",))).engine.api_key is False


def test_an_engine_from_yaml_reads_the_file(make: Callable[..., FakeServer], key_file: Path) -> None:
    server = make(api_key=KEY)
    try:
        assert shared_engine(server.url, api_key_file=str(key_file)).api_key == KEY
    finally:
        close_engines()


# ------------------------------------------------------------------------------------------------------ shown nowhere


def test_what_a_server_reports_of_itself_is_kept_without_its_keys(make: Callable[..., FakeServer]) -> None:
    server = make(api_key=KEY, admin_api_key=ADMIN)
    with AsyncSGLang.connect(server.url, api_key=KEY, admin_api_key=ADMIN) as engine:
        info = engine.pool.info
        assert info.raw["internal_states"] == [{"last_gen_throughput": 0.0}]
        for shown in (repr(info), json.dumps(info.raw), repr(engine), repr(engine.pool), repr(engine.pool.clients)):
            assert KEY not in shown
            assert ADMIN not in shown
        assert engine.api_key == KEY


def test_no_error_holds_a_key(make: Callable[..., FakeServer]) -> None:
    server = make(api_key="the-right-one")
    errors: list[SGLangError] = []
    for url in (server.url, "http://127.0.0.1:9", "http://no.such.host.invalid:1"):
        with pytest.raises(SGLangError) as caught:
            AsyncSGLang.connect(url, api_key=KEY, admin_api_key=ADMIN)
        errors.append(caught.value)
    assert isinstance(errors[0], RequestRejectedError)
    for error in errors:
        for shown in ("".join(traceback.format_exception(error)), str(pickle.dumps(error))):
            assert KEY not in shown
            assert ADMIN not in shown


def test_the_doctors_findings_hold_no_key(make: Callable[..., FakeServer]) -> None:
    server = make(api_key=KEY)
    for key in (KEY, "another-secret"):
        diagnosis = Diagnosis()
        diagnosis.add(*check_server(server.url, ClientConfig(api_key=key)))
        assert server.url in json.dumps(diagnosis.to_json())
        assert key not in json.dumps(diagnosis.to_json()) + diagnosis.table(width=200)


def test_logs_of_a_weight_sync_hold_no_key(
    make: Callable[..., FakeServer], tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server = make(api_key=KEY, admin_api_key=ADMIN)
    with AsyncSGLang.connect(server.url, api_key=KEY, admin_api_key=ADMIN) as engine:
        report = engine.update_weights(read_checkpoint(tiny_llama))
        engine.pool.generate([[1, 2]], SamplingParams(max_new_tokens=1))
        copy_ = pickle.loads(pickle.dumps(engine.pool))
        assert copy_.generate([[1, 2]], SamplingParams(max_new_tokens=1))  # in another process too
        assert KEY not in repr(copy_)
    for shown in (repr(report), caplog.text):
        assert KEY not in shown
        assert ADMIN not in shown
