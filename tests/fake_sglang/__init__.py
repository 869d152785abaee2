"""A fake SGLang server: its HTTP contract, its state machine, a real gloo group, no model; and faults on demand.

For the failures a real server can't be made to show, and for tests that should not wait 20 seconds for one. What it
does in the ordinary case is held to the truth by contract tests that run against a real server too.

In a test's own process, quick, and its tensors can be looked at::

    with FakeServer(FakeSettings(model_path=folder)) as server:
        server.arm(Fault(path="/begin_weight_update", action="refuse", message="busy"))
        ...
        assert [event["path"] for event in server.events] == [...]

As a process of its own, to be killed, stopped with SIGSTOP, or to die in the middle of a broadcast::

    with FakeServerProcess(FakeSettings(model_path=folder)) as server:
        server.arm(Fault(path="/update_weights_from_distributed", action="die", at="joined"))

or by hand: ``python -m tests.fake_sglang --model-path FOLDER --port 30000``.

What is simplified: text is decoded only where the folder has a ``tokenizer.json``; of the sampling parameters those of
:class:`~tests.fake_sglang.sequences.Sampling` have an effect; ``/weights_checker`` hashes the
checkpoint's tensors instead of SGLang's fused ones; ``/update_weights_from_tensor`` and the OpenAI endpoints are
missing (404).
"""

from tests.fake_sglang.faults import Fault, FaultAction, FaultPoint
from tests.fake_sglang.model import logprobs, signature
from tests.fake_sglang.process import FakeServerProcess
from tests.fake_sglang.server import FakeServer
from tests.fake_sglang.settings import FakeSettings

__all__ = [
    "FakeServer",
    "FakeServerProcess",
    "FakeSettings",
    "Fault",
    "FaultAction",
    "FaultPoint",
    "logprobs",
    "signature",
]
