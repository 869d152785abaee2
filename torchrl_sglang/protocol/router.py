"""The worker list of sglang-router (0.3.2), and what its ``/generate`` forwards to the servers behind it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torchrl_sglang.config import SamplingParams
from torchrl_sglang.errors import ProtocolError, RequestRejectedError, SGLangError
from torchrl_sglang.protocol.messages import HttpRequest

__all__ = [
    "build_add_worker",
    "build_list_workers",
    "build_readiness",
    "build_remove_worker",
    "has_no_workers",
    "parse_workers",
    "router_forwards",
    "worker_in_error",
]

# The router parses a request into the fields it knows and silently drops the others. These arrive at the server (tried
# with 0.3.2; numbers are rounded to 32 bits). `rid` and `lora_path` must be single strings.
_FORWARDED = {
    *("input_ids", "sampling_params", "return_logprob", "logprob_start_len", "stream", "extra_key"),
    *("image_data", "video_data", "audio_data"),
}
_FORWARDED_SAMPLING = {
    *("max_new_tokens", "min_new_tokens", "n", "sampling_seed", "ignore_eos", "stop", "stop_token_ids"),
    *("no_stop_trim", "skip_special_tokens", "temperature", "top_p", "top_k", "min_p", "frequency_penalty"),
    *("presence_penalty", "repetition_penalty", "json_schema", "regex", "ebnf"),
}

_DEFAULTS = SamplingParams().to_wire()


def router_forwards(request: HttpRequest, *, filled_in: Collection[str] = ()) -> bool:
    """Whether the router forwards a request for generation to a server without changing its meaning.

    It may drop a sampling parameter that has its default, unless the server fills in another value. A ``null`` is
    dropped too.

    Args:
        request: the request.
        filled_in: the sampling parameters that the servers fill in (:attr:`ServerInfo.preferred_sampling`).

    Examples:
        >>> body = {"input_ids": [[1]], "sampling_params": SamplingParams(temperature=0.5).to_wire()}
        >>> router_forwards(HttpRequest(method="POST", path="/generate", body=body))
        True
        >>> body["sampling_params"]["logit_bias"] = {"7": 1.0}
        >>> router_forwards(HttpRequest(method="POST", path="/generate", body=body))
        False
    """
    body = request.body or {}
    sampling = body.get("sampling_params", {})
    dropped = {name for name, value in sampling.items() if name not in _FORWARDED_SAMPLING or value is None}
    return (
        body.keys() - {"lora_path"} <= _FORWARDED
        and isinstance(body.get("lora_path", ""), str)
        and all(name not in filled_in and sampling[name] == _DEFAULTS.get(name) for name in dropped)
    )


def build_readiness() -> HttpRequest:
    """Readiness check: 200 as soon as a worker can serve; ``/health`` is 200 without any worker."""
    return HttpRequest(method="GET", path="/readiness", timeout="probe", repeatable=True)


def build_add_worker(url: str) -> HttpRequest:
    """Add a server. The router answers at once, and checks and adds the server in the background.

    The request does not hold the server's key: a router that knows the key would serve every caller. Each request for
    generation has its own key.
    """
    return HttpRequest(method="POST", path="/workers", body={"url": url}, timeout="probe")


def build_list_workers() -> HttpRequest:
    """List all workers."""
    return HttpRequest(method="GET", path="/workers", timeout="probe", repeatable=True)


def build_remove_worker(worker_id: str) -> HttpRequest:
    """Remove a worker. The router answers at once, and removes it in the background."""
    return HttpRequest(method="DELETE", path=f"/workers/{worker_id}", timeout="probe")


def parse_workers(answer: Any, *, router: str) -> dict[str, str]:
    """The ids of all workers, by URL.

    Raises:
        ProtocolError: the answer is not a router's.

    Examples:
        >>> parse_workers({"workers": [{"id": "7", "url": "http://a:1", "is_healthy": True}]}, router="r")
        {'http://a:1': '7'}
    """
    if not isinstance(answer, Mapping) or not isinstance(answer.get("workers"), list):
        raise ProtocolError(f"{router} does not list workers: not an sglang-router (0.3 or later)", server=router)
    return {str(worker["url"]): str(worker["id"]) for worker in answer["workers"]}


def has_no_workers(error: SGLangError) -> bool:
    """Whether the router refused a request because it has no worker that can serve."""
    return isinstance(error, RequestRejectedError) and error.status == 503 and "No available workers" in error.detail


def worker_in_error(error: SGLangError, urls: Iterable[str]) -> str | None:
    """The worker to which the router lost the connection during a request; ``None`` if it is none of ``urls``.

    Examples:
        >>> error = RequestRejectedError("", status=500, detail="error sending request. URL: http://a:1/generate")
        >>> worker_in_error(error, ["http://a:11", "http://a:1"])
        'http://a:1'
    """
    if not isinstance(error, RequestRejectedError) or error.status < 500:
        return None
    return next((url for url in urls if f"{url}/" in error.detail), None)
