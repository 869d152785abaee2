"""What an agent requests of a session, and what the session answers and records.

Shapes: ``T`` tokens of a whole conversation, ``R`` tokens of one choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

__all__ = [
    "ChatRequest",
    "Choice",
    "FinishReason",
    "OnProgress",
    "Progress",
    "SessionInfo",
    "SessionStatus",
    "TextRequest",
    "TokenLogProb",
    "Trajectory",
    "Turn",
]

FinishReason = Literal["stop", "length", "tool_calls"]
"""Why a choice ended, in OpenAI's words."""

SessionStatus = Literal["active", "finished", "expired"]
"""``finished``: its reward is known; ``expired``: its agent was silent for too long. Both take no more requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """One request for the next message of a conversation.

    Attributes:
        messages: the conversation in OpenAI's form, as the client sent it. The roles are ``system``, ``developer``,
            ``user``, ``assistant`` and ``tool``; the content is a string, a list of parts, or ``None``.
        tools: JSON schemas of the functions that the model may call, in OpenAI's form.
        tool_choice: ``"auto"``, ``"none"``, ``"required"``, or the name of a function in
            ``{"type": "function", "function": {"name": ...}}``.
        parallel_tool_calls: ``False``: at most one call in a message.
        template_kwargs: variables of the chat template, such as ``enable_thinking``.
        sampling: the settings that the client gave, in the names of :meth:`SamplingParams.from_kwargs`, ``n`` and
            ``max_new_tokens`` included. What is missing has the session's default; a response without
            ``max_new_tokens`` may fill the context.
        top_logprobs: number of the most likely tokens to report for each token.
        idempotency_key: two requests of a session with the same key are one request.
        attempt: how often the client says that it has sent this request before (``x-stainless-retry-count``).
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    tool_choice: str | Mapping[str, Any] = "auto"
    parallel_tool_calls: bool | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    top_logprobs: int = 0
    idempotency_key: str | None = None
    attempt: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest:
    """One request to continue a text or token ids, without a chat template.

    Attributes:
        prompt: text, or token ids. If what an earlier request of the session sampled follows its prompt here, the
            sampled tokens are kept.
        sampling: as in :class:`ChatRequest`.
        top_logprobs: as in :class:`ChatRequest`.
        idempotency_key: as in :class:`ChatRequest`.
        attempt: as in :class:`ChatRequest`.
    """

    prompt: str | tuple[int, ...]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    top_logprobs: int = 0
    idempotency_key: str | None = None
    attempt: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogProb:
    """A token, its text and its natural-log probability."""

    token_id: int
    text: str
    log_prob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One sampled answer.

    Attributes:
        index: its number among the request's choices.
        message: the answer in OpenAI's form: ``role``, ``content`` (``None`` beside tool calls if nothing was said),
            and, where there is one, ``reasoning_content`` and ``tool_calls`` (``arguments`` is JSON text). Of a
            continued text the content is the text, without special tokens.
        text: the whole text, with reasoning, calls and special tokens as they were written; a stop string is trimmed.
        token_ids: the sampled tokens, length ``R``; the token that ended the answer is included.
        log_probs: natural-log probability of each of them, length ``R``.
        weight_versions: the weights that generated each of them, length ``R``.
        finish_reason: why it ended.
        top_log_probs: per token the most likely tokens; empty unless requested.
        stop: the stop string that ended it, if one did.
    """

    index: int
    message: Mapping[str, Any]
    text: str
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    weight_versions: tuple[int, ...]
    finish_reason: FinishReason
    top_log_probs: tuple[tuple[TokenLogProb, ...], ...] = ()
    stop: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """The answer to one request.

    Attributes:
        id: names the turn in its session; the same for a retry that got the recorded answer.
        choices: the sampled answers, ``n`` of them.
        prompt_tokens: number of tokens of the prompt.
        completion_tokens: number of sampled tokens of all choices.
        cached_tokens: prompt tokens that the server had in its prefix cache (of the choice with the most).
        is_repeated: the request was recognised as a retry: nothing was generated for it.
        read_prompt_ids: returns the prompt's tokens, as the server saw them.
    """

    id: str
    choices: tuple[Choice, ...]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    is_repeated: bool = False
    read_prompt_ids: Callable[[], list[int]] = field(default=list, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One choice as far as it is generated. What an earlier report had does not change.

    Attributes:
        index: number of the choice.
        text: all text so far that is certain (no half character, no beginning of a stop string).
        content: the part of it that belongs to the message's ``content``. With tools, what may be a call is held back;
            the finished message's content begins with this.
        reasoning_content: the part of it that belongs to ``reasoning_content``.
        token_ids: all tokens so far, length ``R``.
        log_probs: their natural-log probabilities, length ``R``.
        top_log_probs: as in :class:`Choice`.
    """

    index: int
    text: str
    content: str
    reasoning_content: str
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    top_log_probs: tuple[tuple[TokenLogProb, ...], ...] = ()


OnProgress = Callable[[Progress], None]
"""Called in the session's event loop while a choice is generated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One leaf of a session's tree: a token sequence that was sent to and sampled by the model.

    The four per-token tuples have length ``T``.

    Attributes:
        token_ids: all tokens, of prompts and answers.
        loss_mask: 1 exactly for sampled tokens.
        log_probs: natural-log probability of each sampled token, 0.0 for the others.
        weight_versions: the weights that generated each sampled token, -1 for the others.
        finish_reason: why the last answer ended.
        messages: the conversation in OpenAI's form, the last answer included.
        parent: index, in the list of trajectories, of the one from which this one branches off; ``None`` for a
            conversation of its own. It is always an earlier one.
        shared_tokens: number of tokens at the beginning that another trajectory before it in the list has too, from
            the same sampling. To count every sampled token once, use :attr:`own_mask`.
        temperatures: the temperature at which each sampled token was drawn, 0.0 for greedy ones (whose log-probs count
            as temperature 1) and for the others.
        exact_log_probs: whether the log-probs are those of the distribution that the tokens were drawn from: not if
            the agent asked for ``top_p``, ``top_k`` or ``min_p``.
        images: URLs of the images in ``token_ids``, in their order. In ``token_ids`` each has as many tokens as the
            server put in its place.
        session: id of the session.
        reward: the session's reward; ``None`` if there is none.
        info: what was given with the reward.
        tags: what was given when the session was created.
        status: the session's status. Do not train on an expired session by accident.
    """

    token_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]
    log_probs: tuple[float, ...]
    weight_versions: tuple[int, ...]
    finish_reason: FinishReason
    messages: tuple[Mapping[str, Any], ...]
    parent: int | None
    shared_tokens: int = 0
    temperatures: tuple[float, ...] = ()
    exact_log_probs: bool = True
    images: tuple[str, ...] = ()
    session: str = ""
    reward: float | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, Any] = field(default_factory=dict)
    status: SessionStatus = "active"

    @property
    def own_mask(self) -> tuple[int, ...]:
        """``loss_mask`` without the tokens that an earlier trajectory has: over a session, each sampled token once.

        Examples:
            >>> leaf = Trajectory(token_ids=(5, 6, 7), loss_mask=(0, 1, 1), log_probs=(0.0, -0.5, -0.1),
            ...                   weight_versions=(-1, 3, 3), finish_reason="stop", messages=(), parent=0,
            ...                   shared_tokens=2)
            >>> leaf.own_mask
            (0, 0, 1)
        """
        return (0,) * self.shared_tokens + self.loss_mask[self.shared_tokens :]

    def as_json(self) -> dict[str, Any]:
        """The trajectory as the HTTP interface returns it."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionInfo:
    """A session, seen from outside.

    Attributes:
        id: its id.
        status: whether it takes requests.
        turns: number of finished turns.
        trajectories: number of leaves.
        sampled_tokens: number of sampled tokens, each counted once.
        in_flight: number of turns under way.
        age_s: seconds since it was created.
        idle_s: seconds since the agent was last heard of.
        reward: its reward, if there is one.
        info: what was given with the reward.
        tags: what was given when it was created.
    """

    id: str
    status: SessionStatus
    turns: int
    trajectories: int
    sampled_tokens: int
    in_flight: int
    age_s: float
    idle_s: float
    reward: float | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, Any] = field(default_factory=dict)
