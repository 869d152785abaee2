"""Score answers with a frozen reference model: on its own servers, or as a copy in the trainer's process."""

from __future__ import annotations

from collections.abc import Callable

import torch
from omegaconf import DictConfig
from tensordict import TensorDict, lazy_stack
from torchrl.modules.llm import Tokens

from torchrl_sglang.config.checking import require
from torchrl_sglang.engine import AsyncSGLang
from torchrl_sglang.hydra_configs import build
from torchrl_sglang.recipes.batch.sequences import Sequences
from torchrl_sglang.recipes.losses.scoring import score_in_parts
from torchrl_sglang.recipes.setup.models import load_model
from torchrl_sglang.rollout import SGLangWrapper

__all__ = ["Reference", "make_reference", "score_on_servers"]

Reference = Callable[[Sequences], torch.Tensor]
"""Maps answers to the log-prob of every response token; float32 of shape (N,)."""


def make_reference(
    config: DictConfig, servers: AsyncSGLang, *, micro_batch: int, progress: Callable[[str], None] | None = None
) -> Reference:
    """Make the reference model that ``config.reference.kind`` selects.

    Args:
        config: ``reference.kind`` is ``server`` (configured by the node ``reference_engine``) or ``copy``, which loads
            a frozen copy of ``model`` on the trainer's device (``train.device``).
        servers: the servers that receive the trained weights; the reference must not be one of them.
        micro_batch: answers per forward pass of a copy.
        progress: called with a line of text while servers load.

    Raises:
        ConfigError: another kind, or a reference on a server that receives the trained weights.
    """
    kind = config.reference.kind
    require(kind in ("server", "copy"), f"reference.kind must be 'server' or 'copy', got {kind!r}")
    if kind == "copy":
        frozen = load_model(config.model, config.train.device).requires_grad_(False)
        return lambda sequences: score_in_parts(frozen, sequences, micro_batch=micro_batch)
    engine: AsyncSGLang = build(config.reference_engine, progress=progress)
    shared = {client.url for client in engine.pool.clients} & {client.url for client in servers.pool.clients}
    require(
        not shared,
        f"{sorted(shared)} can't be the reference: these servers receive the trained weights. Set reference_engine.url "
        "to another server, or leave it out to launch one",
    )
    scorer = SGLangWrapper(engine, input_mode="tokens", generate=False, pad_output=False)
    return lambda sequences: score_on_servers(scorer, sequences)


def score_on_servers(scorer: SGLangWrapper, sequences: Sequences) -> torch.Tensor:
    """Let servers score answers sampled elsewhere; the log-probs are not tempered.

    Args:
        scorer: a wrapper in tokens mode, with ``generate=False`` and ragged output.
        sequences: the answers.

    Returns:
        Float32 of shape (N,), on the answers' device.

    Examples:
        >>> from torchrl_sglang.recipes.batch.sequences import example
        >>> from torchrl_sglang.testing.echo_pool import EchoPool
        >>> scorer = SGLangWrapper(EchoPool(), input_mode="tokens", generate=False)
        >>> score_on_servers(scorer, example()).shape
        torch.Size([4])
    """
    pairs = zip(sequences.prompt_B_T, sequences.response_B_R, strict=True)
    rows = [TensorDict(tokens=Tokens(full=torch.cat(pair).cpu())) for pair in pairs]
    scored = scorer(lazy_stack(rows)).get(("log_probs", "full"), as_list=True)
    responses = [full_L[len(full_L) - length :] for full_L, length in zip(scored, sequences.lengths_B, strict=True)]
    return torch.cat(responses).float().to(sequences.server_N.device)
