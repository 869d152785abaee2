"""Why a server did not come up, read from what it wrote before it ended."""

from __future__ import annotations

import re
import signal

__all__ = ["ADDRESS_IN_USE", "describe_exit", "explain_failure", "last_meaningful_line"]

ADDRESS_IN_USE = re.compile(r"address already in use|EADDRINUSE|port (at )?\d+ is (not available|in use|already)", re.I)

_INSTALL = (
    "SGLang is not installed in the server's Python. Without a GPU: `torchrl-sglang install-cpu-server`; with one: "
    '`pip install "torchrl-sglang[sglang]"`, or another environment named by ServerConfig(python=...).'
)
# In order: the first that matches is the cause, later ones are often its consequences.
_CAUSES: tuple[tuple[str, str], ...] = (
    (r"No module named '?sglang'?(?![.\w])", _INSTALL),
    (
        r"No module named '?([\w.]+)",
        "The server's Python lacks the module {0!r}: its SGLang installation is incomplete. Without a GPU, "
        "`torchrl-sglang install-cpu-server` makes a complete one.",
    ),
    (
        r"error: unrecognized arguments: (.+)",
        "This SGLang version doesn't know {0}: correct ServerConfig.extra_args (`python -m sglang.launch_server "
        "--help` lists what it knows).",
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
# What SGLang says of every start: its settings, and models that it does not have the libraries for.
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
    """The likely cause and what to do about it, or an empty string when the log says nothing known.

    Args:
        log: what the server wrote.
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
    # SGLang kills itself as a whole when one of its processes fails; that one says why.
    failures = _EXCEPTION.findall(log) if "kill_process_tree called" in log else []
    return f"One of its processes failed: {failures[-1][:300]}." if failures else _MEMORY_KILL


def last_meaningful_line(log: str) -> str:
    r"""The latest line that tells a person how far the server is: no blank lines, no warnings' source lines.

    Examples:
        >>> last_meaningful_line("[2026-01-01 10:00:00] Load weight begin.\n  warnings.warn(\n\n")
        'Load weight begin.'
    """
    for line in reversed(re.split(r"[\r\n]+", log)):
        text = re.sub(r"\x1b\[[0-9;]*m", "", line)
        if not text.strip() or text[0].isspace() or "Warning:" in text or '"GET /' in text:
            continue
        return re.sub(r"^\[[^\]]*\]\s*", "", text).strip()[:160]
    return ""
