"""Why a server did not become ready, read from its log and its exit code."""

from __future__ import annotations

import re
import signal

__all__ = ["ADDRESS_IN_USE", "INSTALL_ROUTER", "describe_exit", "explain_failure"]

ADDRESS_IN_USE = re.compile(r"address already in use|EADDRINUSE|port (at )?\d+ is (not available|in use|already)", re.I)

INSTALL_ROUTER = (
    'pip install "torchrl-sglang[router]" (or --no-deps sglang-router, where pip must not touch SGLang\'s packages)'
)
"""How to get the router's package."""

_INSTALL = (
    "SGLang is not installed in the server's Python. Without a GPU: `torchrl-sglang install-cpu-server`; with one: "
    '`pip install "torchrl-sglang[sglang]"`, or another environment named by ServerConfig(python=...).'
)
# The first pattern that matches is the cause; later ones are often its consequences.
_CAUSES: tuple[tuple[str, str], ...] = (
    (r"No module named '?sglang'?(?![.\w])", _INSTALL),
    (r"No module named '?sglang_router", f"sglang-router is not installed in the router's Python: {INSTALL_ROUTER}."),
    (
        r"No module named '?([\w.]+)",
        "The server's Python lacks the module {0!r}: its SGLang installation is incomplete. Without a GPU, "
        "`torchrl-sglang install-cpu-server` makes a complete one.",
    ),
    (
        r"error: unrecognized arguments: (.+)",
        "This SGLang version doesn't know {0}: correct ServerConfig.extra_args (`python -m sglang.launch_server "
        "--help` lists its flags).",
    ),
    (r"(?:launch_server\.py|sglang serve): error: (.+)", "SGLang refused its command line: {0}."),
    (
        ADDRESS_IN_USE.pattern,
        "Another program took the port meanwhile: give another ServerConfig.port, or None for a free one.",
    ),
    (
        r"out of memory|OutOfMemoryError|cannot allocate memory|not enough memory|bad_alloc",
        "Out of memory: lower mem_fraction_static, max_total_tokens or context_length, raise tp_size, or make room "
        "(is a trainer or another server on the same GPU?).",
    ),
    (
        r"is not a local folder and is not a valid model identifier|Repository ?Not ?Found|HFValidationError|"
        r"couldn't connect to '?https?://|LocalEntryNotFound|OfflineModeIsEnabled|cannot find the requested files",
        "The model was not found: is the hub name right, and can this machine reach the hub? A path to a checkpoint "
        "folder always works.",
    ),
    (
        r"Unrecognized model in|does not recognize this architecture|architectures .* are not supported",
        "This SGLang version can't serve this model's architecture.",
    ),
    (
        r"no kernel image is available|CUDA driver version is insufficient|Found no NVIDIA driver",
        "The server's torch doesn't fit this machine's GPU or driver; ServerConfig(device='cpu') serves without one.",
    ),
)
# What SGLang logs at every start: its settings, and models whose libraries are not installed.
_NO_CAUSE = re.compile(r"^.*(?:server_args=|Ignore import error).*$", re.MULTILINE)
_EXCEPTION = re.compile(r"^[\w.]*(?:Error|Exception|Interrupt)\b.*$", re.MULTILINE)
_MEMORY_KILL = (
    "It was killed from outside with SIGKILL, as the kernel does when memory runs out: lower max_total_tokens, serve "
    "in a smaller dtype, or free memory."
)


def describe_exit(code: int) -> str:
    """An exit code in words.

    Examples:
        >>> describe_exit(1), describe_exit(137)
        ('exit code 1', 'exit code 137 (SIGKILL)')
    """
    number = -code if code < 0 else code - 128
    if number in {member.value for member in signal.Signals}:
        return f"exit code {code} ({signal.Signals(number).name})"
    return f"exit code {code}"


def explain_failure(log: str, code: int | None) -> str:
    """The likely cause and what to do about it, or an empty string when no known cause is in the log.

    Args:
        log: the server's log.
        code: its exit code; ``None`` while it still runs.

    Examples:
        >>> explain_failure("/usr/bin/python: No module named sglang", 1)[:39]
        "SGLang is not installed in the server's"
    """
    log = _NO_CAUSE.sub("", log)
    for pattern, advice in _CAUSES:
        match = re.search(pattern, log, re.IGNORECASE)
        if match:
            return advice.format(*match.groups()) if "{0" in advice else advice
    if code not in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return ""
    # SGLang kills all its processes when one of them fails; the log of that one has the cause.
    failures = _EXCEPTION.findall(log) if "kill_process_tree called" in log else []
    return f"One of its processes failed: {failures[-1][:300]}." if failures else _MEMORY_KILL
