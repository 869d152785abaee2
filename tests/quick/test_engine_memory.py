"""Offloaded GPU memory, against a stand-in that, like SGLang, dies of calls in a wrong order instead of refusing them.

No CPU server can release memory; that it says so is shown at a real one in ``tests/loop/test_engine.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.quick.gpu_server import WEIGHTS, WITH_BACKUP, GpuServer
from torchrl_sglang import AsyncSGLang, ConfigError, RequestRejectedError, SamplingParams, ServerError


@pytest.fixture
def make(tiny_llama: Path) -> Iterator[Callable[..., GpuServer]]:
    made: list[GpuServer] = []

    def start(**flags: Any) -> GpuServer:
        made.append(GpuServer(tiny_llama, **flags))
        return made[-1]

    yield start
    for each in made:
        each.die()


def test_memory_is_released_by_paused_idle_servers_and_comes_back_with_the_block(
    make: Callable[..., GpuServer],
) -> None:
    server = make(**WITH_BACKUP)
    with AsyncSGLang.connect(server.url) as engine:
        with engine.offloaded():
            assert server.released == {"cuda_graph", "kv_cache", "weights"}
            with pytest.raises(ServerError, match="its GPU memory is offloaded: resume_memory"):
                engine.generate(input_ids=[3, 4])
            with pytest.raises(ConfigError, match="is offloaded: resume_memory"):
                engine.update_weights({})
        assert server.calls == [
            "/pause_generation",
            "/flush_cache",
            "/release_memory_occupation cuda_graph kv_cache weights",
            "/resume_memory_occupation cuda_graph kv_cache weights",
            "/continue_generation",
        ]
        assert not engine.pool.quarantined


def test_the_block_ends_with_the_memory_back_when_the_trainer_fails(make: Callable[..., GpuServer]) -> None:
    server = make(**WITH_BACKUP)
    with AsyncSGLang.connect(server.url) as engine:
        with pytest.raises(ZeroDivisionError), engine.offloaded(["kv_cache"]):
            raise ZeroDivisionError
        assert not server.released
        assert not server.paused


def test_a_part_at_a_time_and_nothing_twice(make: Callable[..., GpuServer]) -> None:
    server = make(**WITH_BACKUP)
    with AsyncSGLang.connect(server.url) as engine:
        engine.resume_memory()  # nothing is offloaded: no call reaches the server
        assert server.calls == []
        engine.release_memory(["kv_cache"])
        with pytest.raises(ConfigError, match=r"released \['kv_cache'\] already"):
            engine.release_memory()
        engine.release_memory(["weights"])
        engine.resume_memory(["weights"])
        assert server.paused
        engine.resume_memory()
        assert not server.paused
        assert server.calls.count("/pause_generation") == 1


def test_weights_without_a_backup_are_gone_until_the_next_update(make: Callable[..., GpuServer]) -> None:
    server = make(**WEIGHTS)
    with AsyncSGLang.connect(server.url) as engine:
        with engine.offloaded():
            pass
        assert server.paused
        assert server.version == "dirty-1", "no other process takes an answer of it either"
        with pytest.raises(ServerError, match="the next weight update brings new ones"):
            engine.generate(input_ids=[3, 4])
    with AsyncSGLang.connect(server.url) as another:
        assert list(another.pool.quarantined) == [server.url]


def test_a_busy_or_refusing_server_goes_on_serving_and_the_others_too(make: Callable[..., GpuServer]) -> None:
    good, bad = make(**WITH_BACKUP), make(**WITH_BACKUP)
    with AsyncSGLang.connect([good.url, bad.url]) as engine:
        bad.running = 1
        with pytest.raises(RequestRejectedError, match="requests are running"):
            engine.release_memory()
        assert not any("release" in call for call in bad.calls), "it would have died of it"
        bad.running, bad.refuse_release = 0, True
        with pytest.raises(RequestRejectedError, match="no"):
            engine.release_memory()
        for server in (good, bad):
            assert not server.released
            assert not server.paused
        assert not engine.pool.quarantined
        assert not any(known.offloaded_tags for known in engine.pool.state.servers.values())


def test_a_server_that_is_gone_at_the_release_holds_up_neither_the_block_nor_a_later_weight_update(
    make: Callable[..., GpuServer],
) -> None:
    good, dead = make(**WITH_BACKUP), make(**WITH_BACKUP)
    with AsyncSGLang.connect([good.url, dead.url]) as engine:
        dead.die()
        with engine.offloaded():
            assert good.released
        assert not good.released
        assert [client.url for client in engine.pool.healthy] == [good.url]
        assert "resume_memory" not in engine.pool.quarantined[dead.url]
        engine.pool.refuse_while_offloaded()


def test_offloaded_memory_counts_also_while_its_server_is_quarantined(make: Callable[..., GpuServer]) -> None:
    server = make(**WITH_BACKUP)
    with AsyncSGLang.connect(server.url) as engine:
        engine.release_memory(["kv_cache"])
        engine.pool.quarantine(server.url, "a test")
        with pytest.raises(ConfigError, match="is offloaded: resume_memory"):
            engine.update_weights({})
        engine.release_memory(["weights"])
        assert server.calls.count("/pause_generation") == 1
        engine.resume_memory()
        assert not engine.pool.quarantined


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, r"launched without --enable-memory-saver .*extra_args=\('--enable-memory-saver',\)"),
        ({"device": "cpu", **WEIGHTS}, "runs on the CPU: it holds no GPU memory"),
    ],
)
def test_a_server_that_cannot_says_so_before_anything_is_done(
    make: Callable[..., GpuServer], flags: dict[str, Any], message: str
) -> None:
    able, unable = make(**WITH_BACKUP), make(**flags)
    with AsyncSGLang.connect([able.url, unable.url]) as engine:
        with pytest.raises(ConfigError, match=message), engine.offloaded():
            pytest.fail("the block was entered")
        with pytest.raises(ConfigError, match="tags are some of"):
            engine.release_memory(["everything"])  # type: ignore[list-item]
        assert able.calls == unable.calls == []
        assert len(engine.pool.healthy) == 2
        engine.pool.check([[3, 4]], SamplingParams())
