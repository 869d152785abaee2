"""Settings of a launched router."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torchrl_sglang.config.checking import as_path, names_checked, require, require_numbers, words

__all__ = ["RouterConfig"]

_OWN_FLAGS = ("--host", "--port", "--policy", "--worker-urls", "--api-key")


@names_checked()
@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """How an ``sglang-router`` process is launched. Everything not named here goes into ``extra_args``."""

    policy: Literal["cache_aware", "power_of_two", "round_robin", "random"] = "cache_aware"
    """Which server gets a request. ``cache_aware``: the one that has most of the prompt in its cache, unless loads
    differ too much; ``power_of_two``: the less busy of two random ones; ``round_robin``: the next one."""
    python: str | None = None
    """Python that has sglang-router installed; ``None`` is the current one."""
    host: str = "127.0.0.1"
    """Address to listen on. Everybody who reaches it can add workers: do not use it on open networks."""
    port: int | None = None
    """Port to listen on; ``None`` picks a free one."""
    extra_args: tuple[str, ...] = ()
    """More of the router's command-line words, appended as they are."""
    start_timeout_s: float = 60.0
    """From launch to ready; takes a second, unless the machine is busy."""
    log_dir: Path | None = None
    """Folder of its log; ``None`` is a temporary folder, removed after a clean stop, kept after a failure."""

    def __post_init__(self) -> None:
        policies = ("cache_aware", "power_of_two", "round_robin", "random")
        require(self.policy in policies, f"policy must be one of {policies}, got {self.policy!r}")
        require_numbers(self, "port", at_least=1, at_most=65535)
        require_numbers(self, "start_timeout_s", above=0)
        object.__setattr__(self, "extra_args", words("extra_args", self.extra_args))
        for word in self.extra_args:
            flag = word.partition("=")[0]
            require(
                flag not in _OWN_FLAGS,
                f"{flag} in extra_args: host, port and policy have fields, the engine adds the workers, and each "
                "request brings its own key",
            )
        if self.log_dir is not None:
            object.__setattr__(self, "log_dir", as_path("log_dir", self.log_dir))
