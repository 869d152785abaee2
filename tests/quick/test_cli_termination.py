"""SIGTERM ends a command, whatever Python is doing when it arrives."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from torchrl_sglang.cli.termination import Termination


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    sum(range(10))  # the handler runs between two instructions


class FreedAtABadMoment:
    def __del__(self) -> None:
        terminate()


def test_it_interrupts_and_leaves_the_handler_as_it_was() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), Termination():
        terminate()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_arrives_while_an_object_is_freed_is_not_lost() -> None:
    with Termination() as termination:
        termination.check()
        FreedAtABadMoment()  # Python drops what its __del__ raises
        with pytest.raises(KeyboardInterrupt):
            termination.check()


def test_in_another_thread_it_does_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def use() -> None:
        with Termination() as termination:
            termination.check()
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [before]
