"""A session's tree as trajectories: one token sequence per leaf."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchrl_sglang.agents.conversation.tree import Node, Tree
from torchrl_sglang.agents.types import Trajectory

__all__ = ["make_trajectories", "sampled_tokens"]


def make_trajectories(tree: Tree, *, first_index: int = 0, **about: Any) -> list[Trajectory]:
    """One trajectory per leaf, in the order in which the leaves were recorded.

    Args:
        tree: what the session sampled.
        first_index: index of the first one in the session's list.
        about: the attributes that all trajectories of the session share.
    """
    first_with: dict[Node, int] = {}
    made = []
    for index, leaf in enumerate(tree.leaves(), first_index):
        chain = leaf.chain()
        shared = next((node for node in reversed(chain) if node in first_with), None)
        # A sequence without shared tokens may still belong to an earlier one's conversation.
        related = shared or next((node for node in reversed(leaf.path()) if node in first_with), None)
        made.append(
            Trajectory(
                **_sequence(chain),
                finish_reason=leaf.finish_reason,
                messages=tuple(message.as_openai() for message in leaf.messages()),
                parent=None if related is None else first_with[related],
                shared_tokens=0 if shared is None else shared.num_tokens(),
                **about,
            )
        )
        for node in chain:
            first_with.setdefault(node, index)
    return made


def _sequence(chain: list[Node]) -> Mapping[str, Any]:
    token_ids: list[int] = []
    loss_mask: list[int] = []
    log_probs: list[float] = []
    weight_versions: list[int] = []
    temperatures: list[float] = []
    turn_starts: list[int] = []
    for node in chain:
        given, sampled = len(node.prompt_ids), len(node.output_ids)
        if sampled:
            turn_starts.append(len(token_ids) + given)
        token_ids += [*node.prompt_ids, *node.output_ids]
        loss_mask += [0] * given + [1] * sampled
        log_probs += [0.0] * given + list(node.log_probs)
        weight_versions += [-1] * given + list(node.versions)
        temperatures += [0.0] * given + [node.temperature] * sampled
    return {
        "token_ids": tuple(token_ids),
        "loss_mask": tuple(loss_mask),
        "log_probs": tuple(log_probs),
        "weight_versions": tuple(weight_versions),
        "temperatures": tuple(temperatures),
        "turn_starts": tuple(turn_starts),
        "images": tuple(url for node in chain for url in node.images),
        "exact_log_probs": all(node.exact_log_probs for node in chain),
    }


def sampled_tokens(tree: Tree) -> int:
    """Number of sampled tokens, each counted once."""
    return sum(len(node.output_ids) for node in tree.nodes)
