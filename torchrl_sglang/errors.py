"""The exception tree. Every message says what happened, what state the servers are in, and what to do next.

::

    SGLangError
    ├── ConfigError(ValueError)                    an argument can't be honoured
    │   └── ContextLengthError                     a conversation is longer than the model's context
    ├── StorageError(OSError)                      a file could not be written, most often because the disk is full
    ├── ProtocolError                              the answer is not what this SGLang version promises
    ├── ServerError(RuntimeError)
    │   ├── ServerStartError                       the process did not become ready; has the log's tail
    │   ├── ServerUnreachableError(ConnectionError)   no connection was made: nothing ran, safe to send again
    │   ├── ServerLostError(ConnectionError)       the connection broke after sending: the request may have run
    │   ├── ServerTimeoutError(TimeoutError)       no answer in time: the request may still be running
    │   ├── LethalPromptError                      servers died on a prompt; has the other prompts' replies
    │   └── RequestRejectedError                   the server answered with an error status
    ├── SessionError                               an agent's session does not take the request
    │   ├── UnknownSessionError(LookupError)       there is no session of this id
    │   ├── SessionKeyError(PermissionError)       the key is not the session's
    │   ├── SessionFinishedError                   it has its reward, or has expired
    │   └── OverloadedError                        too much is under way or kept; says when to try again
    ├── AgentsFailedError(RuntimeError)            no group of an agent's runs gives anything to train on
    └── WeightSyncError(RuntimeError)              has the state of every server's weights
        ├── WeightCoverageError                    names, shapes, dtypes or values don't match, listed
        └── WeightUpdateError                      refused, timed out, or failed verification

All of them pickle (they cross process boundaries in multi-process collectors), and none ever contains an API key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

__all__ = [
    "AgentsFailedError",
    "ConfigError",
    "ContextLengthError",
    "LethalPromptError",
    "OverloadedError",
    "ProtocolError",
    "RequestRejectedError",
    "SGLangError",
    "ServerError",
    "ServerLostError",
    "ServerStartError",
    "ServerTimeoutError",
    "ServerUnreachableError",
    "ServerWeights",
    "SessionError",
    "SessionFinishedError",
    "SessionKeyError",
    "StorageError",
    "UnknownSessionError",
    "WeightCoverageError",
    "WeightSyncError",
    "WeightUpdateError",
]

ServerWeights = Literal["old", "new", "mixed", "stuck"]
"""What a server holds after a failed sync.

``old``: nothing was changed; ``new``: complete and serving; ``mixed``: partly changed, quarantined until a full sync
succeeds; ``stuck``: hangs in a collective and must be restarted.
"""


class SGLangError(Exception):
    """Base of all errors that this package raises itself."""


class ConfigError(SGLangError, ValueError):
    """An argument can't be honoured. Nothing was sent or started."""


class ContextLengthError(ConfigError):
    """A prompt, or a prompt and the response that was asked for, is longer than the model's context.

    Attributes:
        prompt_tokens: length of the prompt; ``None`` if it is not known.
        response_tokens: length of the response that was asked for; 0 if the prompt alone is too long.
        limit: the most tokens that both may have together.
    """

    def __init__(
        self, message: str, *, prompt_tokens: int | None = None, response_tokens: int = 0, limit: int | None = None
    ) -> None:
        super().__init__(message)
        self.prompt_tokens = prompt_tokens
        self.response_tokens = response_tokens
        self.limit = limit


class StorageError(SGLangError, OSError):
    """Files could not be written, most often because the disk is full. An incomplete new file or folder is removed.

    Attributes:
        path: what should have been written.
        needed_bytes: how large it would have been, if known.
        free_bytes: what was free on that disk afterwards, if known.
    """

    def __init__(
        self, message: str, *, path: str = "", needed_bytes: int | None = None, free_bytes: int | None = None
    ) -> None:
        super().__init__(message)
        self.path = path
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


class ProtocolError(SGLangError):
    """The answer is not what this SGLang version promises (another web server, half a reply, a missing field).

    Attributes:
        server: base URL of the server that answered, if known.
    """

    def __init__(self, message: str, *, server: str | None = None) -> None:
        super().__init__(message)
        self.server = server


class ServerError(SGLangError, RuntimeError):
    """A server did not start, could not be reached, or did not do what a request asked for.

    Attributes:
        server: base URL of the server, if known.
    """

    def __init__(self, message: str, *, server: str | None = None) -> None:
        super().__init__(message)
        self.server = server


class ServerStartError(ServerError):
    """A server process did not become ready.

    Attributes:
        log_tail: the last lines of the process's log.
    """

    def __init__(self, message: str, *, server: str | None = None, log_tail: str = "") -> None:
        super().__init__(message, server=server)
        self.log_tail = log_tail


class ServerUnreachableError(ServerError, ConnectionError):
    """No connection was made, so nothing can have run: sending again is safe.

    Attributes:
        is_local: the cause is on this machine (no free file descriptor, no name resolution, no network): it says
            nothing about the server.
    """

    def __init__(self, message: str, *, server: str | None = None, is_local: bool = False) -> None:
        super().__init__(message, server=server)
        self.is_local = is_local


class ServerLostError(ServerError, ConnectionError):
    """The connection broke after the request was sent: it may have run, so it was not sent again."""


class ServerTimeoutError(ServerError, TimeoutError):
    """No answer within the time-out: the request may still be running on the server."""


class LethalPromptError(ServerError):
    """Servers died on prompts: each was in two requests during which a server died, alone in the last one.

    Attributes:
        prompts: per index of such a prompt, how the last server died.
        replies: per index of every other prompt, its replies.
    """

    def __init__(
        self,
        message: str,
        *,
        server: str | None = None,
        prompts: Mapping[int, str] | None = None,
        replies: Mapping[int, Sequence[Any]] | None = None,
    ) -> None:
        super().__init__(message, server=server)
        self.prompts: dict[int, str] = dict(prompts or {})
        self.replies: dict[int, list[Any]] = {index: list(each) for index, each in (replies or {}).items()}


class RequestRejectedError(ServerError):
    """The server answered with an error status, or that it did not succeed.

    Attributes:
        status: HTTP status code.
        detail: the server's own message.
        is_from_proxy: a proxy or ingress before the server has answered, not SGLang.
    """

    def __init__(
        self,
        message: str,
        *,
        server: str | None = None,
        status: int = 0,
        detail: str = "",
        is_from_proxy: bool = False,
    ) -> None:
        super().__init__(message, server=server)
        self.status = status
        self.detail = detail
        self.is_from_proxy = is_from_proxy


class SessionError(SGLangError):
    """An agent's session does not take a request. What the session has recorded stays as it is.

    Attributes:
        session: id of the session; empty if there is none.
    """

    def __init__(self, message: str, *, session: str = "") -> None:
        super().__init__(message)
        self.session = session


class UnknownSessionError(SessionError, LookupError):
    """There is no session of this id: it never existed, or was deleted."""


class SessionKeyError(SessionError, PermissionError):
    """The key is missing, or is not that of the session."""


class SessionFinishedError(SessionError):
    """The session has its reward, or has expired: it takes no more requests."""


class OverloadedError(SessionError):
    """The gateway keeps as many sessions, or has as many requests waiting, as it may. Nothing was sent.

    Attributes:
        retry_after_s: seconds after which trying again makes sense.
    """

    def __init__(self, message: str, *, session: str = "", retry_after_s: float = 1.0) -> None:
        super().__init__(message, session=session)
        self.retry_after_s = retry_after_s


class AgentsFailedError(SGLangError, RuntimeError):
    """Collecting ended: one group of an agent's runs after the other failed, or had equal rewards.

    Attributes:
        failures: the latest runs that failed, one text each.
    """

    def __init__(self, message: str, *, failures: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.failures = tuple(failures)


class WeightSyncError(SGLangError, RuntimeError):
    """A weight sync did not finish.

    Attributes:
        server_weights: per server URL, the state of its weights (see :data:`ServerWeights`).
    """

    def __init__(self, message: str, *, server_weights: Mapping[str, ServerWeights] | None = None) -> None:
        super().__init__(message)
        self.server_weights: dict[str, ServerWeights] = dict(server_weights or {})


class WeightCoverageError(WeightSyncError):
    """The trainer's tensors don't match the served checkpoint. Raised before the first byte is sent.

    Attributes:
        missing: names the checkpoint has and the trainer does not send.
        unknown: names the trainer sends and the checkpoint does not have.
        mismatched: one line per tensor with a wrong shape or dtype, or with NaN/inf values.
    """

    def __init__(
        self,
        message: str,
        *,
        server_weights: Mapping[str, ServerWeights] | None = None,
        missing: Sequence[str] = (),
        unknown: Sequence[str] = (),
        mismatched: Sequence[str] = (),
    ) -> None:
        super().__init__(message, server_weights=server_weights)
        self.missing = tuple(missing)
        self.unknown = tuple(unknown)
        self.mismatched = tuple(mismatched)


class WeightUpdateError(WeightSyncError):
    """A server refused the sync, it timed out, or verification failed; ``server_weights`` has each server's state."""
