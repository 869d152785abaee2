"""The plugin that launched servers load: ranks wait as long as a group's name says, and other groups as they did."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from torchrl_sglang.config import ServerConfig
from torchrl_sglang.server.environment import PLUGIN_PATH, child_environment
from torchrl_sglang.weights.group.rendezvous import group_mark, group_name
from torchrl_sglang.weights.group.trainer_mark import TrainerMark

NAMES = ("torchrl_sglang_group_timeout", "torchrl_sglang_tensor_errors")
MODULES = ("stand_in_sglang_utils", "stand_in_sglang_updater")


@pytest.fixture
def plugin() -> Any:
    spec = importlib.util.spec_from_file_location("plugin", PLUGIN_PATH / "torchrl_sglang_group_timeout.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def importers() -> Iterator[list[Any]]:
    """The module that defines the function, and one that has imported its name."""

    def init_custom_process_group(backend: Any = None, timeout: Any = None, group_name: Any = None) -> Any:
        return group_name, timeout

    modules = [types.ModuleType(name) for name in MODULES]
    for module in modules:
        module.init_custom_process_group = init_custom_process_group  # type: ignore[attr-defined]
        sys.modules[module.__name__] = module
    yield modules
    for name in MODULES:
        del sys.modules[name]


def test_the_limit_is_read_from_the_groups_name_wherever_the_function_was_imported(
    plugin: Any, importers: list[Any]
) -> None:
    plugin.bound_waits()
    plugin.bound_waits()  # SGLang's processes may load plugins more than once
    name = group_name(group_mark("a1b2c3d4", 3, 60.5))
    for module in importers:
        assert module.init_custom_process_group(group_name=name) == (name, timedelta(seconds=91))
        assert module.init_custom_process_group(group_name="weight_update_group") == ("weight_update_group", None)
        given = timedelta(seconds=5)
        assert module.init_custom_process_group(group_name=name, timeout=given) == (name, given)


def test_a_mark_with_a_limit_still_names_its_trainer_and_group() -> None:
    group = group_mark("a1b2c3d4", 3, 60.5)
    mark = TrainerMark.parse(str(TrainerMark.own(group)))
    assert (mark.owner, mark.group) == ("a1b2c3d4", group)


def test_sglang_finds_the_plugin_by_the_metadata_on_the_servers_path() -> None:
    (found,) = importlib.metadata.distributions(path=[str(PLUGIN_PATH)])
    assert {entry.group for entry in found.entry_points} == {"sglang.srt.plugins"}
    for entry in found.entry_points:
        module, function = entry.value.split(":")
        assert entry.name == module
        assert f"def {function}(" in (PLUGIN_PATH / f"{module}.py").read_text()


@pytest.mark.parametrize(("chosen", "loaded"), [(None, None), ("", ""), ("mine", f"mine,{','.join(NAMES)}")])
def test_a_choice_of_plugins_is_extended(chosen: str | None, loaded: str | None) -> None:
    parent = {} if chosen is None else {"SGLANG_PLUGINS": chosen}
    variables = child_environment(ServerConfig(model="m"), parent, cpu=False, same_python=True)
    assert variables.get("SGLANG_PLUGINS") == loaded
    assert variables["PYTHONPATH"].split(":")[-1] == str(PLUGIN_PATH)


def test_an_idle_connection_is_closed_by_the_client_long_before_the_server_closes_it() -> None:
    from torchrl_sglang import connections

    name = "SGLANG_TIMEOUT_KEEP_ALIVE"
    variables = child_environment(ServerConfig(model="m"), {}, cpu=False, same_python=True)
    assert float(variables[name]) > 10 * connections.IDLE_LIMIT_S
    chosen = child_environment(ServerConfig(model="m"), {name: "7"}, cpu=False, same_python=True)
    assert chosen[name] == "7"
