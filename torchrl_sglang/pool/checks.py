"""Checks of servers and replies: one model in a pool, and no token from half-updated weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torchrl_sglang.errors import ConfigError, WeightSyncError
from torchrl_sglang.model_files import read_model_json
from torchrl_sglang.protocol.messages import GenerateReply, ServerInfo, WeightSpan
from torchrl_sglang.protocol.model_limits import find_unsupported
from torchrl_sglang.protocol.version import WeightVersion

__all__ = ["label_with_version", "refuse_different_models", "refuse_mixed_weights"]


def refuse_different_models(infos: Sequence[ServerInfo]) -> None:
    """Require that all servers serve the same generating model, and compute it as transformers does.

    Raises:
        ConfigError: they serve different models, one that generates no text, or one of which SGLang ignores a setting.
    """
    first = infos[0]
    for info in infos:
        if not info.is_generation:
            raise ConfigError(f"{info.url} serves {info.model_path!r}, which does not generate text")
        if (info.architectures, info.vocab_size) != (first.architectures, first.vocab_size):
            raise ConfigError(
                f"{first.url} serves {first.model_path!r} and {info.url} serves {info.model_path!r}: "
                "one pool needs servers of one model"
            )
        if info.model_path == first.model_path and info.revision != first.revision:
            raise ConfigError(
                f"{first.url} serves revision {first.revision} of {first.model_path!r} and {info.url} revision "
                f"{info.revision}: one pool needs servers of one model"
            )
        _refuse_unsupported_model(info)


def _refuse_unsupported_model(info: ServerInfo) -> None:
    """Require that the server computes the model as transformers does. Nothing is known of a checkpoint elsewhere.

    Raises:
        ConfigError: SGLang ignores a setting of the checkpoint, and so returns wrong log-probs.
    """
    problems = find_unsupported(
        read_model_json(info.model_path, "config.json", info.revision),
        attention_backend=info.raw.get("attention_backend"),
        context_length=info.context_length,
    )
    if problems:
        raise ConfigError(
            f"{info.url} does not compute {info.model_path!r} as transformers does: {'; '.join(problems)}. Launch the "
            "server in another way"
        )


def label_with_version(version: str, reply: GenerateReply) -> GenerateReply:
    """Give a reply an adapter's version, since servers don't count adapters as weight versions.

    A request keeps the adapter that it began with, so all its tokens have one version.
    """
    span = WeightSpan(version=version, start=0, end=len(reply.output_ids))
    return replace(reply, weight_version=version, weight_spans=(span,))


def refuse_mixed_weights(replies: Sequence[GenerateReply]) -> None:
    """Require that no token was generated with half-updated weights.

    Raises:
        WeightSyncError: a server generated with weights that are marked dirty.
    """
    for reply in replies:
        if any(WeightVersion.parse(span.version).dirty for span in reply.weight_spans if span.end > span.start):
            raise WeightSyncError(
                f"{reply.server} generated with half-updated or unverified weights ({reply.weight_version}); the batch "
                "is thrown away. servers.update_weights(model) sends the weights again",
                server_weights={reply.server: "mixed"},
            )
