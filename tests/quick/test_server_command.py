"""The command line of a server: its words, their order, and what is refused before anything starts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from torchrl_sglang.config import ServerConfig
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.server.command import (
    build_command,
    build_url,
    check_config,
    keys_as_yaml,
    local_model_path,
)
from torchrl_sglang.server.locate import find_python


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def command_of(config: ServerConfig, *, cpu: bool = True, key_file: Path | None = None) -> list[str]:
    return build_command(config, port=31150, rendezvous_port=31151, cpu=cpu, key_file=key_file)


def value_of(command: list[str], flag: str) -> str:
    """The value SGLang's argument parser would take: the last one."""
    positions = [i for i, word in enumerate(command) if word == flag]
    assert positions, f"{flag} is not in {command}"
    return command[positions[-1] + 1]


def test_a_cpu_server_gets_the_flags_that_sglang_needs_on_a_cpu(checkpoint: Path) -> None:
    command = command_of(ServerConfig(model=str(checkpoint)))
    assert command[:3] == [sys.executable, "-m", "sglang.launch_server"]
    expected = {
        "--model-path": str(checkpoint),
        "--host": "127.0.0.1",
        "--port": "31150",
        "--nccl-port": "31151",
        "--tp-size": "1",
        "--device": "cpu",
        "--dtype": "float32",
        "--attention-backend": "torch_native",
        "--sampling-backend": "pytorch",
        "--max-total-tokens": "8192",
        "--mem-fraction-static": "0.9",
    }
    assert {flag: value_of(command, flag) for flag in expected} == expected
    assert {"--sleep-on-idle", "--skip-server-warmup", "--disable-cuda-graph"} <= set(command)


def test_a_gpu_server_gets_sglangs_own_defaults(checkpoint: Path) -> None:
    command = command_of(ServerConfig(model=str(checkpoint), device="cuda", tp_size=2), cpu=False)
    assert [word for word in command if word.startswith("--")] == [
        "--model-path",
        "--host",
        "--port",
        "--nccl-port",
        "--tp-size",
    ]


def test_every_field_that_was_set_reaches_a_gpu_server(checkpoint: Path) -> None:
    config = ServerConfig(
        model=str(checkpoint), dtype="bfloat16", context_length=4096, mem_fraction_static=0.5, max_total_tokens=9000
    )
    command = command_of(config, cpu=False)
    assert value_of(command, "--dtype") == "bfloat16"
    assert value_of(command, "--context-length") == "4096"
    assert value_of(command, "--mem-fraction-static") == "0.5"
    assert value_of(command, "--max-total-tokens") == "9000"


def test_a_long_context_enlarges_the_kv_cache_of_a_cpu_server(checkpoint: Path) -> None:
    command = command_of(ServerConfig(model=str(checkpoint), context_length=20000))
    assert value_of(command, "--max-total-tokens") == "20000"


def test_extra_args_come_last_and_override(checkpoint: Path) -> None:
    extra = ("--grammar-backend", "xgrammar", "--enable-lora")
    command = command_of(ServerConfig(model=str(checkpoint), extra_args=extra), key_file=Path("keys.yaml"))
    assert tuple(command[-3:]) == extra
    assert value_of(command, "--grammar-backend") == "xgrammar"


def test_keys_are_in_a_file_that_sglang_reads_and_never_on_the_command_line(checkpoint: Path) -> None:
    config = ServerConfig(model=str(checkpoint), api_key='s3:"cr\\et', admin_api_key="yes")
    command = command_of(config, key_file=Path("keys.yaml"))
    assert value_of(command, "--config") == "keys.yaml"
    assert not any(key in word for word in command for key in (config.api_key, config.admin_api_key) if key)
    assert yaml.safe_load(keys_as_yaml(config) or "") == {"api-key": 's3:"cr\\et', "admin-api-key": "yes"}
    assert keys_as_yaml(ServerConfig(model="m")) is None


@pytest.mark.parametrize(
    ("word", "field"),
    [("--port", "port"), ("--port=1", "port"), ("--tp", "tp_size"), ("--model", "model")],
)
def test_a_flag_that_has_a_field_is_refused_in_extra_args(checkpoint: Path, word: str, field: str) -> None:
    with pytest.raises(ConfigError, match=rf"set ServerConfig\.{field} instead"):
        check_config(ServerConfig(model=str(checkpoint), extra_args=(word, "1")))


@pytest.mark.parametrize("key", ["", "-x", "two words"])
def test_an_invalid_key_is_refused_and_not_shown(checkpoint: Path, key: str) -> None:
    with pytest.raises(ConfigError, match="admin_api_key must not") as caught:
        check_config(ServerConfig(model=str(checkpoint), admin_api_key=key))
    assert key == "" or key not in str(caught.value).replace("start with '-'", "")


def test_a_python_that_does_not_exist_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="not an executable file.*install-cpu-server"):
        check_config(ServerConfig(model=str(checkpoint), python=str(checkpoint / "bin" / "python")))


def test_the_link_to_a_virtual_environments_python_is_not_resolved(tmp_path: Path) -> None:
    link = tmp_path / "python"
    link.symlink_to(sys.executable)
    assert find_python(ServerConfig(model="m", python=str(link))) == str(link)


@pytest.mark.parametrize("model", ["/no/such/folder", "./nothing", "~/nothing-here", "a/b/c"])
def test_a_path_without_a_checkpoint_is_refused(model: str) -> None:
    with pytest.raises(ConfigError, match="no such file or folder"):
        check_config(ServerConfig(model=model))


def test_a_folder_that_is_no_checkpoint_is_refused_and_its_files_are_listed(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ConfigError, match=r"without config\.json \(it holds weights\.bin\)"):
        check_config(ServerConfig(model=str(tmp_path)))


def test_a_relative_checkpoint_becomes_absolute_and_a_hub_name_stays(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    assert local_model_path("checkpoint") == checkpoint
    assert value_of(command_of(ServerConfig(model="Qwen/Qwen3-0.6B")), "--model-path") == "Qwen/Qwen3-0.6B"


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:80"), ("::1", "http://[::1]:80"), ("node-7", "http://node-7:80")],
)
def test_the_url_names_the_host_with_ipv6_in_brackets(host: str, url: str) -> None:
    assert build_url(ServerConfig(model="m", host=host), 80) == url


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_the_url_of_a_server_on_all_interfaces_has_the_address_of_one(host: str) -> None:
    url = build_url(ServerConfig(model="m", host=host), 80)
    assert url.startswith("http://")
    assert url.endswith(":80")
    assert not any(wildcard in url for wildcard in ("//0.0.0.0", "[::]", "//:"))


def test_a_certificate_makes_the_url_https() -> None:
    config = ServerConfig(model="m", extra_args=("--ssl-certfile", "c.pem", "--ssl-keyfile", "k.pem"))
    assert build_url(config, 443) == "https://127.0.0.1:443"
