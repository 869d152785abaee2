"""Checks of a running server: its model and settings, and whether it can receive weights."""

from __future__ import annotations

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import ClientConfig
from torchrl_sglang.doctor.checks import Check
from torchrl_sglang.errors import SGLangError
from torchrl_sglang.protocol.messages import ServerInfo
from torchrl_sglang.protocol.version import WeightVersion
from torchrl_sglang.weights.shared_memory.same_host import check_same_host

__all__ = ["check_server"]


def check_server(url: str, config: ClientConfig | None = None) -> list[Check]:
    """Check a server; changes nothing on it.

    Args:
        url: base URL.
        config: keys and time-outs.
    """
    client = SGLangClient(url, config)
    try:
        info = client.connect()
        session = client.dialect.weight_session
    except SGLangError as error:
        return [Check(name="server", status="fail", detail=str(error), next_step="see `torchrl-sglang serve`")]
    finally:
        client.close()
    detail = f"{info.url}: SGLang {info.version} serves {info.model_path} ({', '.join(info.architectures)})"
    form = "update session" if session else "no update session (before 0.5.21)"
    return [
        Check(name="server", status="pass", detail=f"{detail} on {info.device}, dtype {info.dtype}; {form}"),
        _vocabulary(info),
        _updates(info),
        _transport(info),
        _weights(info),
    ]


def _vocabulary(info: ServerInfo) -> Check:
    if info.vocab_size is None:
        return Check(
            name="vocabulary",
            status="warn",
            detail=f"the size can't be read: {info.model_path!r} is not on this machine",
            next_step="pass vocab_size=... when connecting: an unknown token id crashes a server",
        )
    return Check(
        name="vocabulary", status="pass", detail=f"{info.vocab_size} ids, context {info.context_length} tokens"
    )


def _updates(info: ServerInfo) -> Check:
    if info.dp_size > 1 or info.pp_size > 1:
        return Check(
            name="weight updates",
            status="fail",
            detail=f"dp_size={info.dp_size}, pp_size={info.pp_size}: a process group can't reach all ranks",
            next_step="use several servers instead of dp_size, tensor instead of pipeline parallelism",
        )
    return Check(name="weight updates", status="pass", detail=f"possible; {info.tp_size} rank(s) in the process group")


def _transport(info: ServerInfo) -> Check:
    """How ``SyncConfig(transport="auto")`` sends weights to it from this process."""
    check = check_same_host(info.url)
    detail = "ipc: it shares this host's memory" if check.is_shared else f"broadcast: {check.reason}"
    return Check(name="weight transport", status="pass", detail=f"auto is {detail}")


def _weights(info: ServerInfo) -> Check:
    version = WeightVersion.parse(info.weight_version)
    if version.dirty:
        return Check(
            name="weights",
            status="fail",
            detail=f"mixed weights ({info.weight_version}): a trainer died or failed during a sync",
            next_step="send all weights again: WeightSync(pool).push(model), or restart the server",
        )
    return Check(name="weights", status="pass", detail=f"version {info.weight_version}")
