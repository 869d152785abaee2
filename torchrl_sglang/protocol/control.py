"""Control calls: everything that steers a server besides generating."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torchrl_sglang.errors import RequestRejectedError
from torchrl_sglang.protocol.messages import HttpRequest

__all__ = [
    "build_abort",
    "build_begin_update",
    "build_checksum",
    "build_continue",
    "build_destroy_group",
    "build_end_update",
    "build_flush",
    "build_init_group",
    "build_load_lora",
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
    "check_success",
    "parse_checksum",
    "parse_loads",
]


def _post(path: str, body: Mapping[str, Any], **options: Any) -> HttpRequest:
    return HttpRequest(method="POST", path=path, body=body, **options)


def build_ready() -> HttpRequest:
    """Answers in milliseconds, also while paused; ``/health`` would generate a token, and says 503 while paused."""
    return HttpRequest(method="GET", path="/ready", timeout="probe", repeatable=True)


def build_loads(*, legacy: bool = False) -> HttpRequest:
    """How many requests a server holds; ``legacy`` for servers before 0.5.21."""
    return HttpRequest(method="GET", path="/get_load" if legacy else "/v1/loads", timeout="probe", repeatable=True)


def parse_loads(answer: Any) -> int:
    """Number of requests running or waiting, from either form of the answer.

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
    """Stop generating; ``mode`` says what happens to requests in flight (see :class:`SyncConfig`)."""
    return _post("/pause_generation", {"mode": mode})


def build_continue() -> HttpRequest:
    """Go on generating after a pause."""
    return _post("/continue_generation", {})


def build_flush(*, wait_s: float | None = None) -> HttpRequest:
    """Empty the prefix cache. Refused while requests run; ``wait_s`` waits for them that long."""
    return _post("/flush_cache" if wait_s is None else f"/flush_cache?timeout={wait_s:g}", {})


def build_abort(request_id: str | None = None) -> HttpRequest:
    """End one request, or all of them; each still answers with the tokens it has."""
    return _post("/abort_request", {"abort_all": True} if request_id is None else {"rid": request_id})


def build_set_version(version: str) -> HttpRequest:
    """Name the weights a server holds, without touching them or the requests in flight."""
    return _post("/update_weight_version", {"new_version": version, "abort_all_requests": False})


def build_init_group(
    *, address: str, port: int, rank_offset: int, world_size: int, name: str, backend: str
) -> HttpRequest:
    """Join a process group as ranks ``rank_offset .. rank_offset + tp_size - 1``; answers once all ranks are there."""
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
    """Open the weight-update session that SGLang demands since 0.5.21."""
    return _post("/begin_weight_update", {}, timeout="update")


def build_update_bucket(
    *,
    names: Sequence[str],
    dtypes: Sequence[str],
    shapes: Sequence[Sequence[int]],
    group: str,
    flush_cache: bool = False,
) -> HttpRequest:
    """Announce one bucket; the server then receives it over the group, loads it and answers.

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
    """Close the weight-update session; the server then finishes what loading left open (e.g. re-packing)."""
    return _post("/end_weight_update", {}, timeout="update")


def build_update_from_disk(path: str, *, version: str, flush_cache: bool = True) -> HttpRequest:
    """Load a checkpoint folder that the server can read. Needs no session."""
    body = {"model_path": path, "weight_version": version, "flush_cache": flush_cache}
    return _post("/update_weights_from_disk", body, timeout="update")


def build_checksum() -> HttpRequest:
    """Hashes of the tensors a server holds, under its own (fused) names."""
    return _post("/weights_checker", {"action": "checksum"}, timeout="update", repeatable=True)


def parse_checksum(answer: Any) -> dict[str, str]:
    """Flatten the answer to :func:`build_checksum` to ``{"<rank>/<tensor>": hash}``, comparable between servers."""
    flat: dict[str, str] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(inner, f"{path}/{key}" if path else str(key))
        elif isinstance(value, list):
            for index, inner in enumerate(value):
                walk(inner, f"{path}/{index}")
        elif isinstance(value, str) and "checksum" in path:
            flat[path] = value

    walk(answer, "")
    return flat


def build_load_lora(name: str, path: str) -> HttpRequest:
    """Load an adapter from a folder that the server can read."""
    return _post("/load_lora_adapter", {"lora_name": name, "lora_path": path}, timeout="update")


def build_load_lora_from_tensors(name: str, config: Mapping[str, Any], payloads: Sequence[str]) -> HttpRequest:
    """Load an adapter from tensors in the request: one base64 pickle per tensor-parallel rank."""
    body = {"lora_name": name, "config_dict": dict(config), "serialized_named_tensors": list(payloads)}
    return _post("/load_lora_adapter_from_tensors", body, timeout="update")


def build_unload_lora(name: str) -> HttpRequest:
    """Forget an adapter."""
    return _post("/unload_lora_adapter", {"lora_name": name})


def build_release_memory(tags: Sequence[str]) -> HttpRequest:
    """Give GPU memory back: ``"weights"``, ``"kv_cache"``, ``"cuda_graph"``.

    SGLang (0.5.23) answers 200 also without ``--enable-memory-saver``, and frees nothing then; a server that is not
    idle dies of it.
    """
    return _post("/release_memory_occupation", {"tags": list(tags)}, timeout="update")


def build_resume_memory(tags: Sequence[str]) -> HttpRequest:
    """Take GPU memory again. SGLang (0.5.23) dies of a tag that is not released."""
    return _post("/resume_memory_occupation", {"tags": list(tags)}, timeout="update")


def check_success(answer: Any, *, server: str, what: str) -> None:
    """Some control calls answer 200 with ``success: false``: make that an error.

    Raises:
        RequestRejectedError: the answer says it did not succeed.
    """
    if isinstance(answer, Mapping) and answer.get("success") is False:
        detail = str(answer.get("message") or answer.get("error_message") or answer)
        raise RequestRejectedError(f"{server} refused {what}: {detail}", server=server, status=200, detail=detail)
