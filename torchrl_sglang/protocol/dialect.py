"""A server's model, settings and API version, which the client reads once, on connect.

SGLang 0.5.20 and before update weights without a session and report load at ``/get_load``; from 0.5.21 on the session
is mandatory and ``/v1/loads`` is the only load report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchrl_sglang.errors import ConfigError, ProtocolError
from torchrl_sglang.protocol.launch_flags import preferred_sampling, refuse_launch_flags
from torchrl_sglang.protocol.messages import HttpRequest, ServerInfo

__all__ = ["MODEL_INFO", "SERVER_INFO", "SESSION_PROBE", "Dialect", "parse_dialect", "parse_info"]

MODEL_INFO = HttpRequest(method="GET", path="/model_info", timeout="probe", repeatable=True)
SERVER_INFO = HttpRequest(method="GET", path="/server_info", timeout="probe", repeatable=True)
SESSION_PROBE = HttpRequest(method="GET", path="/begin_weight_update", timeout="probe", repeatable=True)
"""The endpoint accepts only POST. To GET it answers 405 if it exists and 404 if not, and begins no session."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """Which version of SGLang's API a server has.

    Attributes:
        weight_session: updates must be between ``/begin_weight_update`` and ``/end_weight_update``.
    """

    weight_session: bool


def parse_dialect(session_probe_status: int) -> Dialect:
    """Read the HTTP status of the answer to :data:`SESSION_PROBE`.

    Examples:
        >>> parse_dialect(405).weight_session, parse_dialect(404).weight_session
        (True, False)
    """
    return Dialect(weight_session=session_probe_status != 404)


def parse_info(model_info: Any, server_info: Any, *, url: str, vocab_size: int | None = None) -> ServerInfo:
    """Read the answers to :data:`MODEL_INFO` and :data:`SERVER_INFO`.

    Raises:
        ProtocolError: this is not an SGLang server, or one too old to serve (no ``weight_version``).
        ConfigError: it was launched with a flag that changes the meaning of every request, see :mod:`.launch_flags`.
    """
    if not isinstance(model_info, Mapping) or "model_path" not in model_info or not isinstance(server_info, Mapping):
        raise ProtocolError(
            f"{url} answers, but not like an SGLang server: /model_info has no model_path. Is the port right?",
            server=url,
        )
    try:
        return _read_info(model_info, server_info, url, vocab_size)
    except ConfigError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise ProtocolError(f"{url} describes itself in another form than SGLang: {error}", server=url) from error


def _read_info(
    model_info: Mapping[str, Any], server_info: Mapping[str, Any], url: str, vocab_size: int | None
) -> ServerInfo:
    refuse_launch_flags(server_info, url=url)
    # SGLang 0.5.23 reports max_req_input_len = context - 6, and refuses prompts of that length too ("exceeds the
    # maximum"). It cuts max_new_tokens down, without a word, so that prompt and response have at most two tokens less
    # than the context, or than the KV cache if that is smaller (--max-total-tokens).
    limit = server_info.get("max_req_input_len")
    context = limit + 4 if limit else server_info.get("context_length")
    return ServerInfo(
        url=url,
        version=str(server_info.get("version", "unknown")),
        model_path=str(model_info["model_path"]),
        tokenizer_path=str(model_info.get("tokenizer_path") or model_info["model_path"]),
        revision=server_info.get("revision"),
        dtype=str(server_info.get("dtype", "auto")),
        architectures=tuple(model_info.get("architectures") or ()),
        is_generation=bool(model_info.get("is_generation", True)),
        tp_size=int(server_info.get("tp_size", 1)),
        dp_size=int(server_info.get("dp_size", 1)),
        pp_size=int(server_info.get("pp_size", 1)),
        max_prompt_tokens=limit - 1 if limit else None,
        context_length=context,
        vocab_size=vocab_size,
        weight_version=str(model_info.get("weight_version", "default")),
        device=str(server_info.get("device") or "cuda"),
        lora_enabled=bool(server_info.get("enable_lora")),
        quantization=server_info.get("quantization"),
        grammar_backend=server_info.get("grammar_backend"),
        skips_tokenizer=bool(server_info.get("skip_tokenizer_init")),
        preferred_sampling=frozenset(preferred_sampling(server_info, url=url)),
        raw=_without_secrets(server_info),
    )


def _without_secrets(value: Any) -> Any:
    """The server's settings without its keys, which SGLang reports too."""
    if isinstance(value, Mapping):
        return {name: _without_secrets(inner) for name, inner in value.items() if not _is_secret(str(name))}
    return [_without_secrets(inner) for inner in value] if isinstance(value, list) else value


def _is_secret(name: str) -> bool:
    return name.endswith("api_key") or "password" in name or "secret" in name
