"""The part of the engine that takes servers in and out, while the others generate."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import ClientConfig
from torchrl_sglang.config.checking import require
from torchrl_sglang.engine.fleet import Fleet, Launcher
from torchrl_sglang.pool import ServerListFollower, SGLangPool
from torchrl_sglang.pool.server_list import ListSource
from torchrl_sglang.progress import shown_progress
from torchrl_sglang.server import SGLangServer
from torchrl_sglang.server_url import url_list

__all__ = ["EngineMembers"]


class EngineMembers:
    """What :class:`AsyncSGLang` is without generation and weights; see there."""

    def __init__(self, pool: SGLangPool, servers: Sequence[SGLangServer], launcher: Launcher | None) -> None:
        self.pool = pool
        self._fleet = Fleet(pool, servers, launcher)
        self._followers: list[ServerListFollower] = []

    def _end_changes(self) -> None:
        """The engine ends: nothing is launched any more, and no list is followed."""
        self._fleet.end()
        for follower in self._followers:
            follower.stop()

    @property
    def servers(self) -> tuple[SGLangServer, ...]:
        """The processes this engine launched; empty when attached."""
        return self._fleet.servers

    @property
    def launched(self) -> tuple[tuple[SGLangClient, SGLangServer], ...]:
        """The processes this engine launched, with their clients."""
        return self._fleet.launched

    def add(
        self,
        servers: int | str | Iterable[str],
        *,
        gpus: Sequence[Sequence[int]] | None = None,
        progress: Callable[[str], None] | bool | None = None,
        client: ClientConfig | None = None,
    ) -> tuple[str, ...]:
        """Take more servers in, while the others generate: launch some, or attach to running ones.

        They get requests when they hold the weights that the others hold: see :meth:`SGLangPool.add`.

        Args:
            servers: how many to launch, with the settings of those that this engine has launched; or the base URL of a
                running server, or several.
            gpus: GPUs of each server to launch, as for :meth:`from_pretrained`; ``None`` takes the lowest that neither
                a server of this engine nor the trainer uses.
            progress: called with a line of text while servers load, as for :meth:`from_pretrained`.
            client: how to talk to running servers that have other keys or certificates than the first one.

        Returns:
            The base URLs of the new servers.

        Raises:
            ConfigError: this engine has launched none and does not know how, there is no room for more, or
                :meth:`SGLangPool.add` refuses them. Nothing is left running, and the pool is as before.
            ServerStartError: one did not become ready; nothing is left running.
            ServerError: one can't be reached.
        """
        if isinstance(servers, Iterable):
            require(gpus is None, "gpus are those of servers to launch: a running server has its own")
            return self.pool.add(url_list(servers), client=client)
        require(client is None, "client is for running servers: servers to launch get the keys of the others")
        with shown_progress(progress) as show:
            return self._fleet.add(servers, gpus=gpus, progress=show)

    def remove(self, urls: str | Iterable[str], *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Take servers out, while the others generate. Those that this engine has launched are ended.

        Args:
            urls: base URL, or several.
            drain: as for :meth:`SGLangPool.remove`: let them finish the requests that they have.
            timeout_s: longest wait, in seconds.

        Raises:
            ConfigError: as :meth:`SGLangPool.remove`. Nothing was changed.
        """
        self._fleet.remove(url_list(urls), drain=drain, timeout_s=timeout_s)

    def scale_to(
        self,
        num_servers: int,
        *,
        gpus: Sequence[Sequence[int]] | None = None,
        drain: bool = True,
        timeout_s: float | None = None,
        progress: Callable[[str], None] | bool | None = None,
    ) -> None:
        """Launch or end servers until the pool has this many. Those that take no requests end first, then the newest.

        Args:
            num_servers: how many servers there are to be, at least one.
            gpus: as for :meth:`add`.
            drain: as for :meth:`remove`.
            timeout_s: as for :meth:`remove`.
            progress: as for :meth:`add`.

        Raises:
            ConfigError: as :meth:`add` and :meth:`remove`, or fewer servers of this engine run than would have to end.
            ServerStartError: as :meth:`add`.
        """
        with shown_progress(progress) as show:
            self._fleet.scale_to(num_servers, gpus=gpus, drain=drain, timeout_s=timeout_s, progress=show)

    def follow(self, source: ListSource, *, poll_s: float = 2.0, grace_s: float | None = None) -> ServerListFollower:
        """Keep the attached servers those of a list that something else changes; launched ones stay.

        Args:
            source: a file with a URL per line (``torchrl-sglang servers`` edits it), a name whose addresses are the
                servers (``"dns://servers.example:30000"``), or a function that returns URLs.
            poll_s: seconds between two looks at the list.
            grace_s: how long a server must be missing before it is removed, in seconds; ``None`` is 30 for a DNS name,
                which leaves out servers that seem not ready, and 0 otherwise.

        Returns:
            What follows the list, in a thread of its own, until its :meth:`stop` or :meth:`shutdown`.

        Raises:
            ConfigError: ``source`` is no list of servers, or this engine is a copy.
        """
        fleet = weakref.ref(self._fleet)

        def launched() -> frozenset[str]:
            known = fleet()
            return frozenset() if known is None else known.own_urls

        follower = ServerListFollower(self.pool, source, poll_s=poll_s, grace_s=grace_s, keep=launched)
        self._followers.append(follower)
        return follower
