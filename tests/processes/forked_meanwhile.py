"""A trainer that forks children while its threads work: `python forked_meanwhile.py CHECKPOINT URL URL`.

A program of its own, as ``forked_trainer.py`` is.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

from transformers import AutoModelForCausalLM

from tests.processes.forked_trainer import in_child
from torchrl_sglang import ConfigError, SyncConfig, WeightSync
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.rollout.batching import Batcher
from torchrl_sglang.weights.group import trainer_mark
from torchrl_sglang.weights.group.trainer_mark import TrainerMark


def sync_of(url: str, transport: Any) -> WeightSync:
    config = SyncConfig(transport=transport, verify="full", verify_atol=1e9)  # a fake server does not score
    return WeightSync(SGLangPool([SGLangClient(url)]), config)


class Computing:
    """A model that computes until it is told to go on, as in a verification in the background."""

    def __init__(self, checkpoint: str) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.model.register_forward_pre_hook(self._wait)

    def _wait(self, *_: Any) -> None:
        self.begun.set()
        assert self.go_on.wait(100)


def main(checkpoint: str, first: str, second: str) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    computing = Computing(checkpoint)
    sync = sync_of(first, "http")
    pending = sync.push_in_background(computing.model)
    assert computing.begun.wait(60)

    def verify() -> None:
        other = sync_of(second, "http")
        other.push(model)
        other.close()

    def ask_for_the_result() -> None:
        pending.join()
        try:
            pending.result()
        except ConfigError as error:
            assert "was begun in process" in str(error), error  # noqa: PT017
        else:
            raise AssertionError("the result is the parent's")

    def marks() -> None:
        assert TrainerMark.own("a.1").is_alive() is False

    batcher: Batcher[int, int] = Batcher(min_items=2, wait_s=60)
    waiting = threading.Thread(target=lambda: batcher.submit([1], lambda items: items), daemon=True)
    waiting.start()
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with batcher._changed, trainer_mark._lock:
            held.set()
            assert release.wait(100)

    holding = threading.Thread(target=hold, daemon=True)
    holding.start()
    assert held.wait(60)
    for action in (verify, ask_for_the_result, marks, lambda: batcher.submit([2, 3], lambda items: items)):
        in_child(action)
        sys.stdout.write(f"{action.__name__}\n")
    release.set()
    assert batcher.submit([2], lambda items: items) == [2]
    for thread in (holding, waiting):
        thread.join(60)
    computing.go_on.set()
    assert pending.result() is not None
    sync.close()

    sync = sync_of(first, "broadcast")
    sync.push(model)
    if os.fork() == 0:
        signal.alarm(60)
        sys.exit(0)  # in full, with what runs at exit
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
    sync.push(model)
    sync.close()
    sys.stdout.write("all done\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
