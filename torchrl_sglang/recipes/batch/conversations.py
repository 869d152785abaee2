"""Conversations of several turns as one token sequence each, with a mask of the tokens that the assistant sampled.

Every turn's prompt begins with all tokens of the turn before; this is checked here. So the last turn holds all tokens
of a conversation, and one forward pass scores all turns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from tensordict import TensorDictBase

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.recipes.batch.sequences import Sequences
from torchrl_sglang.recipes.data.questions import POSITION_KEY

__all__ = ["Conversations"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversations:
    """Completed conversations.

    ``N`` counts all tokens after the first prompts: those of the assistant, and those of tools and of the chat template
    between them. For the latter ``server_N`` is 0 and ``version_N`` is -1.

    Attributes:
        tokens: the conversations; ``response_B_R`` holds all tokens after the first prompt.
        written_N: bool; the assistant sampled this token.
        turns_B: int64; number of answers per conversation.
    """

    tokens: Sequences
    written_N: torch.Tensor
    turns_B: torch.Tensor

    @classmethod
    def from_turns(cls, turns: Iterable[TensorDictBase]) -> Conversations:
        """Join the turns of completed trajectories, as ``LLMCollector(yield_completed_trajectories=True)`` yields them.

        Args:
            turns: one ragged TensorDict per turn; the turns of a conversation follow each other, the last one is done.

        Raises:
            ConfigError: a conversation is incomplete, or its tokens changed from one turn to the next.
        """
        joined = [_join(one) for one in _split(turns)]
        return cls(
            tokens=Sequences(
                prompt_B_T=[one["prompt"] for one in joined],
                response_B_R=[one["response"] for one in joined],
                server_N=torch.cat([one["server"] for one in joined]),
                version_N=torch.cat([one["version"] for one in joined]),
                reward_B=torch.stack([one["reward"] for one in joined]),
                right_B=torch.stack([one["right"] for one in joined]),
                truncated_B=torch.stack([one["truncated"] for one in joined]),
                position_B=torch.stack([one["position"] for one in joined]),
                advantage_N=torch.cat([one["advantage"] for one in joined]) if "advantage" in joined[0] else None,
            ),
            written_N=torch.cat([one["written"] for one in joined]),
            turns_B=torch.stack([one["turns"] for one in joined]),
        )

    @classmethod
    def from_trajectories(cls, td: TensorDictBase) -> Conversations:
        """Read what :class:`AgentCollector` yields: one row per trajectory.

        What an earlier row of the session has is in the prompt of later ones, so each sampled token counts once.

        Args:
            td: ragged, shape ``(B,)``; an ``advantage`` of shape ``(B, 1, 1)`` applies to every token of its row.
        """
        tokens = Sequences.from_tensordict(td)
        masks_B_T = td.get(("masks", "all_assistant_mask"), as_list=True)
        written_B_R = [mask_T[len(ids) :] for mask_T, ids in zip(masks_B_T, tokens.prompt_B_T, strict=True)]
        # An answer begins at each sampled token that follows another one.
        turns_B = [int(written[0]) + int((written[1:] & ~written[:-1]).sum()) for written in written_B_R]
        written_N = torch.cat(written_B_R)
        return cls(
            tokens=replace(tokens, server_N=torch.where(written_N, tokens.server_N, 0.0)),
            written_N=written_N,
            turns_B=torch.tensor(turns_B),
        )

    @property
    def num_written(self) -> int:
        """Number of tokens that the assistant sampled."""
        return int(self.written_N.sum())

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: torch.device) -> Conversations:
        """Copy to a device."""
        return Conversations(
            tokens=self.tokens.to(device), written_N=self.written_N.to(device), turns_B=self.turns_B.to(device)
        )

    def split(self, size: int) -> Iterator[tuple[slice, Sequences]]:
        """Yield parts of at most ``size`` conversations, each with the slice of its tokens among the N."""
        return self.tokens.split(size)


def _split(turns: Iterable[TensorDictBase]) -> Iterator[list[TensorDictBase]]:
    conversation: list[TensorDictBase] = []
    for turn in turns:
        conversation.append(turn)
        if bool(turn["next", "done"].any()):
            yield conversation
            conversation = []
    if conversation:
        raise ConfigError(
            f"the last conversation is incomplete after {len(conversation)} turns: collect completed trajectories "
            "(yield_completed_trajectories=True)"
        )


def _join(turns: list[TensorDictBase]) -> dict[str, torch.Tensor]:
    prompt, last = turns[0]["tokens", "prompt"], turns[-1]
    response = last["tokens", "full"][len(prompt) :]
    written = torch.zeros_like(response, dtype=torch.bool)
    server = torch.zeros(len(response), dtype=torch.float32)
    version = torch.full_like(response, -1)
    known = prompt
    for number, turn in enumerate(turns, 1):
        turn_prompt, full = turn["tokens", "prompt"], turn["tokens", "full"]
        if not torch.equal(turn_prompt[: len(known)], known):
            raise ConfigError(
                f"the prompt of turn {number} does not begin with the tokens of the turn before; they were tokenized "
                "again: create the policy with prefer_tokens=True, or with 'always' for a chat template that rewrites "
                "earlier answers"
            )
        sampled = slice(len(turn_prompt) - len(prompt), len(full) - len(prompt))
        written[sampled] = True
        server[sampled] = turn["log_probs", "response"]
        version[sampled] = turn["generation", "weight_version"]
        known = full
    joined = {
        "prompt": prompt,
        "response": response,
        "written": written,
        "server": server,
        "version": version,
        "reward": torch.stack([turn["next", "reward"].sum() for turn in turns]).sum(),
        "right": last["next", "right"].reshape(()),
        "truncated": last["generation", "truncated"].reshape(()),
        "position": last[POSITION_KEY].reshape(()),
        "turns": torch.tensor(len(turns)),
    }
    if "advantage" in last.keys():  # noqa: SIM118  a TensorDict is not a dict
        joined["advantage"] = last["advantage"].reshape(()).expand(len(response))
    return joined
