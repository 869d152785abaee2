"""The exception tree: base classes, and that errors pickle with their attributes."""

from __future__ import annotations

import inspect
import pickle

import pytest

from torchrl_sglang import errors

URL = "http://127.0.0.1:30000"

EXAMPLES = [
    errors.SGLangError("what"),
    errors.ConfigError("what"),
    errors.ContextLengthError("what"),
    errors.SessionError("what", session="s1"),
    errors.UnknownSessionError("what", session="s1"),
    errors.SessionKeyError("what", session="s1"),
    errors.SessionFinishedError("what", session="s1"),
    errors.OverloadedError("what", session="s1", retry_after_s=2.5),
    errors.AgentsFailedError("what", failures=["run 0 of task 3: timeout"]),
    errors.StorageError("what", path="/runs/a", needed_bytes=5, free_bytes=3),
    errors.ProtocolError("what", server=URL),
    errors.ServerError("what", server=URL),
    errors.ServerStartError("what", server=URL, log_tail="last\nlines"),
    errors.ServerUnreachableError("what", server=URL),
    errors.ServerLostError("what", server=URL),
    errors.ServerTimeoutError("what", server=URL),
    errors.LethalPromptError("what", server=URL, prompts={3: "it died"}, replies={0: ["reply"]}),
    errors.RequestRejectedError("what", server=URL, status=400, detail="no session"),
    errors.WeightSyncError("what", server_weights={URL: "old"}),
    errors.WeightCoverageError(
        "what", server_weights={URL: "old"}, missing=["a"], unknown=["b"], mismatched=["c: (1,) is not (2,)"]
    ),
    errors.WeightUpdateError("what", server_weights={URL: "mixed"}),
]


def test_every_error_class_has_an_example_here():
    classes = {value for _, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, Exception)}
    assert {type(error) for error in EXAMPLES} == classes


def test_all_lists_every_public_name():
    defined = {name for name, value in vars(errors).items() if getattr(value, "__module__", "") == errors.__name__}
    assert defined | {"ServerWeights"} == set(errors.__all__)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_an_error_pickles_with_its_message_and_attributes(error: Exception):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error) == "what"
    assert vars(copy) == vars(error)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.ConfigError, ValueError),
        (errors.StorageError, OSError),
        (errors.ServerError, RuntimeError),
        (errors.ServerUnreachableError, ConnectionError),
        (errors.ServerLostError, ConnectionError),
        (errors.ServerTimeoutError, TimeoutError),
        (errors.WeightSyncError, RuntimeError),
    ],
)
def test_an_error_is_caught_as_the_builtin_people_expect(error: type[Exception], builtin: type[Exception]):
    assert issubclass(error, builtin)
    assert issubclass(error, errors.SGLangError)


def test_a_protocol_error_is_not_a_server_error():
    # Code that restarts servers on ServerError must not do so because of a wrong address.
    assert not issubclass(errors.ProtocolError, errors.ServerError)


def test_only_an_unreachable_server_counts_as_not_having_received_the_request():
    # The retry rule needs this difference.
    assert not issubclass(errors.ServerLostError, errors.ServerUnreachableError)
    assert not issubclass(errors.ServerTimeoutError, errors.ServerUnreachableError)


def test_an_error_copies_the_lists_and_mappings_it_gets():
    missing, weights = ["a"], {URL: "old"}
    error = errors.WeightCoverageError("what", missing=missing, server_weights=weights)
    missing.append("b")
    weights[URL] = "new"
    assert error.missing == ("a",)
    assert error.server_weights == {URL: "old"}
