"""Control calls: requests to a server other than for generation and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torchrl_sglang.errors import RequestRejectedError
from torchrl_sglang.protocol.messages import HttpRequest

__all__ = [
    "build_abort",
    "build_begin_update",
    "build_continue",
    "build_destroy_group",
    "build_end_update",
    "build_flush",
    "build_init_group",
    "build_load_lora_from_tensors",
    "build_loads",
    "build_pause",
    "build_ready",
    "build_release_memory",
    "build_resume_memory",
    "build_set_version",
    "build_unload_lora",
    "build_update_bucket",
    "build_update_from_disk",
    "build_update_from_tensors",
    "check_success",
    "parse_loads",
]


def _post(path: str, body: Mapping[str, Any], **options: Any) -> HttpRequest:
    return HttpRequest(method="POST", path=path, body=body, **options)


def build_ready() -> HttpRequest:
    """Readiness check: answers in milliseconds, also while paused. ``/health`` generates a token; paused it is 503."""
    return HttpRequest(method="GET", path="/ready", timeout="probe", repeatable=True)


def build_loads(*, legacy: bool = False) -> HttpRequest:
    """Number of requests on a server; ``legacy`` for servers before 0.5.21."""
    return HttpRequest(method="GET", path="/get_load" if legacy else "/v1/loads", timeout="probe", repeatable=True)


def parse_loads(answer: Any) -> int:
    """Number of running and waiting requests, from either form of the answer.

    Examples:
        >>> parse_loads({"loads": [{"num_running_reqs": 2, "num_waiting_reqs": 1}]})
        3
        >>> parse_loads([{"num_reqs": 2, "num_waiting_reqs": 1}])
        2
    """
    entries = answer.get("loads", []) if isinstance(answer, Mapping) else answer
    return sum(
        entry["num_running_reqs"] + entry.get("num_waiting_reqs", 0)
        if "num_running_reqs" in entry
        else entry.get("num_reqs", 0)
        for entry in entries
    )


def build_pause(mode: Literal["abort", "retract", "in_place"]) -> HttpRequest:
    """Pause generation; ``mode`` decides what happens to requests in flight (see :class:`SyncConfig`)."""
    return _post("/pause_generation", {"mode": mode})


def build_continue() -> HttpRequest:
    """Continue generation after a pause."""
    return _post("/continue_generation", {})


def build_flush(*, wait_s: float | None = None) -> HttpRequest:
    """Empty the prefix cache. Refused while requests run; with ``wait_s`` the server waits that long for them."""
    return _post("/flush_cache" if wait_s is None else f"/flush_cache?timeout={wait_s:g}", {})


def build_abort(request_id: str | None = None) -> HttpRequest:
    """Abort one request, or all; each answers with the tokens it has so far."""
    return _post("/abort_request", {"abort_all": True} if request_id is None else {"rid": request_id})


def build_set_version(version: str) -> HttpRequest:
    """Set the version string of a server's weights; changes neither the weights nor requests in flight."""
    return _post("/update_weight_version", {"new_version": version, "abort_all_requests": False})


def build_init_group(
    *, address: str, port: int, rank_offset: int, world_size: int, name: str, backend: str
) -> HttpRequest:
    """Join a process group as ranks ``rank_offset .. rank_offset + tp_size - 1``; answers once all ranks joined."""
    body = {
        "master_address": address,
        "master_port": port,
        "rank_offset": rank_offset,
        "world_size": world_size,
        "group_name": name,
        "backend": backend,
    }
    return _post("/init_weights_update_group", body, timeout="update")


def build_destroy_group(name: str) -> HttpRequest:
    """Leave a process group."""
    return _post("/destroy_weights_update_group", {"group_name": name})


def build_begin_update() -> HttpRequest:
    """Begin the weight-update session that SGLang requires since 0.5.21."""
    return _post("/begin_weight_update", {}, timeout="update")


def build_update_bucket(
    *,
    names: Sequence[str],
    dtypes: Sequence[str],
    shapes: Sequence[Sequence[int]],
    group: str,
    flush_cache: bool = False,
) -> HttpRequest:
    """Announce one bucket; the server then receives it over the process group, loads it and answers.

    Args:
        names: checkpoint names, in the order of their bytes.
        dtypes: ``"float32"`` and the like (not ``"torch.float32"``).
        shapes: one shape per name.
        group: name of the process group.
        flush_cache: empty the prefix cache after loading. SGLang's default is true on *every* call, so this is
            always sent.
    """
    body = {
        "names": list(names),
        "dtypes": list(dtypes),
        "shapes": [list(shape) for shape in shapes],
        "group_name": group,
        "flush_cache": flush_cache,
        "load_format": "flattened_bucket",  # one uint8 tensor with the bytes of all
    }
    return _post("/update_weights_from_distributed", body, timeout="update")


def build_end_update() -> HttpRequest:
    """End the weight-update session; the server then finishes loading (e.g. re-packing)."""
    return _post("/end_weight_update", {}, timeout="update")


def build_update_from_disk(path: str, *, version: str, flush_cache: bool = True) -> HttpRequest:
    """Load a checkpoint folder that the server can read. Needs no weight-update session."""
    body = {"model_path": path, "weight_version": version, "flush_cache": flush_cache}
    return _post("/update_weights_from_disk", body, timeout="update")


def build_update_from_tensors(payloads: Sequence[bytes], *, flush_cache: bool = False) -> HttpRequest:
    """Load one bucket, of which the request holds the tensors or says where they lie. Needs a weight-update session.

    Args:
        payloads: one base64 pickle per tensor-parallel rank.
        flush_cache: empty the prefix cache after loading. SGLang's default is true on *every* call.
    """
    body = {"serialized_named_tensors": list(payloads), "flush_cache": flush_cache}
    return _post("/update_weights_from_tensor", body, timeout="update")


def build_load_lora_from_tensors(name: str, config: Mapping[str, Any], payloads: Sequence[bytes]) -> HttpRequest:
    """Load an adapter from tensors in the request: one base64 pickle per tensor-parallel rank."""
    body = {"lora_name": name, "config_dict": dict(config), "serialized_named_tensors": list(payloads)}
    return _post("/load_lora_adapter_from_tensors", body, timeout="update")


def build_unload_lora(name: str) -> HttpRequest:
    """Unload an adapter."""
    return _post("/unload_lora_adapter", {"lora_name": name})


def build_release_memory(tags: Sequence[str]) -> HttpRequest:
    """Release GPU memory: ``"weights"``, ``"kv_cache"``, ``"cuda_graph"``.

    Without ``--enable-memory-saver``, SGLang (0.5.23) answers 200 too, but frees nothing. A server with running
    requests crashes.
    """
    return _post("/release_memory_occupation", {"tags": list(tags)}, timeout="update")


def build_resume_memory(tags: Sequence[str]) -> HttpRequest:
    """Allocate released GPU memory again. SGLang (0.5.23) crashes on a tag that is not released."""
    return _post("/resume_memory_occupation", {"tags": list(tags)}, timeout="update")


def check_success(answer: Any, *, server: str, what: str) -> None:
    """Raise for a control call that was answered with status 200 and ``success: false``.

    Raises:
        RequestRejectedError: with the server's message.
    """
    if isinstance(answer, Mapping) and answer.get("success") is False:
        detail = str(answer.get("message") or answer.get("error_message") or answer)
        raise RequestRejectedError(f"{server} refused {what}: {detail}", server=server, status=200, detail=detail)
