"""Settings of the agents' sessions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_args

from torchrl_sglang.agents.conversation.continuation import OnRewrite
from torchrl_sglang.config.checking import names_checked, require, require_numbers

__all__ = ["SessionSettings"]

_EFFORT = "reasoning_effort"


@names_checked()
@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSettings:
    """Settings of all sessions of a gateway."""

    generation: Mapping[str, Any] = field(default_factory=dict)
    """Sampling settings where a request gives none, in the names of :meth:`SamplingParams.from_kwargs`, or
    ``max_length`` (prompt and response). The checkpoint's recommended ``top_p`` and ``top_k`` are not used: under them
    the recorded log-probs are not those of the distribution that tokens are drawn from."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Sampling settings in place of what requests ask for, in the same names: agents often have ``temperature=0`` built
    in, at which all runs of a task are the same. ``None`` leaves out what they ask for, such as ``seed``; so does
    ``"reasoning_effort": None``, which is no sampling setting, for chat templates without that variable."""
    chat_template: str | None = None
    """A Jinja template instead of the tokenizer's."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template, such as ``enable_thinking``; a request's own go before."""
    on_rewrite: OnRewrite = "branch"
    """What becomes of an earlier answer that the template writes otherwise than it was generated, such as without its
    thinking, or whose calls the agent sends back under their ids with other arguments. ``"branch"``: the prompt is
    what the template makes of it now, and a new trajectory begins. ``"keep"``: the sampled tokens stay in the prompt,
    and the trajectory goes on."""
    tool_call_parser: str | None = None
    """SGLang's name of the format in which the model writes calls; ``None`` finds it, as :class:`SGLangChat` does."""
    adapter: str | None = None
    """A loaded LoRA adapter instead of the trainer's."""
    session_timeout_s: float = 1800.0
    """A session of which nothing is heard for so long, and for which nothing is generated, expires."""
    max_sessions: int = 10_000
    """Most sessions that are kept. Expired ones make room for new ones; then new ones are refused."""
    max_in_flight: int = 256
    """Most sequences under way on each server. Further ones wait, which counts towards their time-out."""
    max_waiting: int = 4096
    """Most sequences that wait; further requests are refused."""
    no_server_wait_s: float = 60.0
    """How long a request waits while no server is healthy, for example until a crashed one is restarted."""
    turn_timeout_s: float | None = None
    """Longest time for one answer, waiting included; ``None`` is ``ClientConfig.generate_timeout_s``."""

    @property
    def leaves_out_effort(self) -> bool:
        """Whether efforts of reasoning that requests ask for have no effect."""
        return _EFFORT in self.overrides

    @property
    def sampling_overrides(self) -> dict[str, Any]:
        """The sampling settings of ``overrides``."""
        return {name: value for name, value in self.overrides.items() if name != _EFFORT}

    def __post_init__(self) -> None:
        require_numbers(self, *(f.name for f in fields(self) if f.name.endswith("_s")), above=0)
        require_numbers(self, "max_sessions", "max_in_flight", "max_waiting", at_least=1)
        require(
            self.overrides.get(_EFFORT) is None,
            f"overrides can only leave {_EFFORT} out (None); give one for all requests in template_kwargs",
        )
        require(
            self.on_rewrite in get_args(OnRewrite),
            f"on_rewrite must be {' or '.join(map(repr, get_args(OnRewrite)))}, got {self.on_rewrite!r}",
        )
