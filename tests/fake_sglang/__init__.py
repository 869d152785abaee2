"""A fake SGLang server: SGLang's HTTP contract and state machine, real gloo groups, no model, and faults on demand.

Tests use it for failures that a real server cannot be made to show, and where 20 seconds for a real server's start are
too long. The contract tests run against both this server and a real one, so that the two behave alike.

:class:`FakeServer` runs in the test's own process: it starts fast, and the test can read its tensors::

    with FakeServer(FakeSettings(model_path=folder)) as server:
        server.arm(Fault(path="/begin_weight_update", action="refuse", message="busy"))
        ...
        assert [event["path"] for event in server.events] == [...]

:class:`FakeServerProcess` is a separate process (working directory: the repository's root), which a test can kill or
suspend, and which can die in the middle of a broadcast::

    with FakeServerProcess(FakeSettings(model_path=folder)) as server:
        server.arm(Fault(path="/update_weights_from_distributed", action="die", at="joined"))

On the command line: ``python -m tests.fake_sglang --model-path FOLDER --port 30000``.

Simplifications: text is decoded only if the folder has a ``tokenizer.json``; only the sampling parameters in
:class:`~tests.fake_sglang.sequences.Sampling` have an effect; ``/weights_checker`` hashes the checkpoint's tensors
instead of SGLang's fused ones; ``/update_weights_from_tensor`` and the OpenAI endpoints are missing (404).
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
