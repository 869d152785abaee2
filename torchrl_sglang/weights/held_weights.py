"""Whether servers hold the tensors that a push leaves out: the frozen ones, or all that a partial one lacks."""

from __future__ import annotations

from collections.abc import Sequence

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.errors import ConfigError, WeightUpdateError
from torchrl_sglang.parallel import side_by_side
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.version import WeightVersion

__all__ = ["HeldWeights"]


class HeldWeights:
    """What one trainer knows of the tensors that the servers of a pool hold.

    Args:
        pool: the servers.
        owner: id of this trainer.
    """

    def __init__(self, pool: SGLangPool, owner: str) -> None:
        self._state = pool.state
        self._owner = owner
        self._processes: dict[str, int] = {}

    def begin(self, clients: Sequence[SGLangClient]) -> None:
        """A push to these servers begins: remember their processes."""
        self._processes = {client.url: self._state.server(client.url).restarts for client in clients}

    def require_own(self, clients: Sequence[SGLangClient], *, partial: bool) -> None:
        """Every server must hold the tensors that are left out as this trainer knows them.

        Args:
            clients: the servers.
            partial: the caller has no other tensors to send; otherwise a server that lacks some is recorded, and all
                are sent.

        Raises:
            ConfigError: a server does not hold them, and the caller has no other tensors to send.
        """
        state = self._state
        versions = side_by_side({client.url: client.weight_version for client in clients})
        for client in clients:
            held = versions[client.url].unwrap()
            version = WeightVersion.parse(held)
            if held != state.server(client.url).version or version.dirty:
                if partial:
                    raise ConfigError(
                        f"{client.url} holds version {held!r}, which this trainer did not send: push all weights first"
                    )
                state.incomplete_found(client.url)
            elif partial and max(0, version.number) != state.weights.version:
                raise ConfigError(
                    f"{client.url} holds version {held!r} and has missed updates, the last one to version "
                    f"{state.weights.version}: push all weights first"
                )

    def require_same_processes(self) -> None:
        """The servers must be the processes that were found to hold the tensors that are left out.

        Raises:
            WeightUpdateError: one was restarted while the weights were packed.
        """
        for url, restarts in self._processes.items():
            if self._state.server(url).restarts != restarts:
                raise WeightUpdateError(
                    f"{url} was restarted while the weights were packed, and lacks those that are not sent. Nothing "
                    "was sent: push again"
                )

    def incomplete(self, clients: Sequence[SGLangClient]) -> list[SGLangClient]:
        """Those that don't hold all tensors of this trainer."""
        return [client for client in clients if self._state.server(client.url).complete_from != self._owner]
