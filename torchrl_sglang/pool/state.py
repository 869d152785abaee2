"""The servers of a pool: what they serve, who may serve now, and what is done to them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.parallel import Outcome, side_by_side
from torchrl_sglang.pool.answers import made_by, refuse_different_models
from torchrl_sglang.pool.dead_servers import DeadServerTracker
from torchrl_sglang.pool.router_client import RouterClient
from torchrl_sglang.protocol.messages import GenerateReply, HttpRequest, ServerInfo
from torchrl_sglang.protocol.version import WeightVersion

__all__ = ["Adapter", "Members", "SavedWeights"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A LoRA adapter that stands for the trainer's weights.

    Attributes:
        name: its name on the servers.
        version: the weight version it stands for, as a server's version string.
    """

    name: str
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedWeights:
    """A whole checkpoint of synced weights that servers can load by themselves.

    Attributes:
        version: the weight version it holds.
        path: its folder, as the servers see it.
    """

    version: WeightVersion
    path: str


class Members:
    """The part of :class:`SGLangPool` that knows the servers; its attributes are described there."""

    def __init__(self, clients: Sequence[SGLangClient], *, router: RouterClient | None = None) -> None:
        if not clients:
            raise ConfigError("a pool needs at least one server")
        self.clients = tuple(clients)
        urls = [client.url for client in self.clients]
        if len(set(urls)) != len(urls):
            raise ConfigError(f"the same server is named twice: {urls}")
        self.router = router
        self._init_runtime()

    def _init_runtime(self) -> None:
        self._lock = threading.Lock()
        self._quarantined: dict[str, str] = {}
        self._restarts: dict[str, int] = {}
        self._deaths = DeadServerTracker()
        self._connected = False
        self.weight_version = 0
        self.highest_version = 0
        self.cache_salt: str | None = None
        self.adapter: Adapter | None = None
        self.saved: SavedWeights | None = None
        self.offloaded_tags: dict[str, set[str]] = {}
        self.update_lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {"clients": self.clients, "router": self.router}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._init_runtime()

    # ------------------------------------------------------------------ who is there

    def connect(self) -> None:
        """Ask every server what it is, once.

        A server that holds half-updated weights (its version is marked dirty) is quarantined until a full sync.

        Raises:
            ServerUnreachableError: a server (or the router) does not listen.
            ConfigError: the servers don't serve the same model, or serve none that generates.
            ServerTimeoutError: the router does not take a server in.
        """
        if self._connected:
            return
        outcomes = side_by_side({client.url: client.connect for client in self.clients})
        infos = [outcomes[client.url].unwrap() for client in self.clients]
        refuse_different_models(infos)
        versions = {info.url: WeightVersion.parse(info.weight_version) for info in infos}
        for url, version in versions.items():
            if version.dirty:
                self.quarantine(url, f"it holds half-updated weights ({version}); a full sync heals it")
        # What an unfinished update was to replace was one lower: a new trainer counts on from there.
        self.weight_version = max(0, *(v.number - v.dirty for v in versions.values()))
        if self.router is not None:
            self.router.join([client.url for client in self.healthy])
        self._connected = True

    @property
    def info(self) -> ServerInfo:
        """What the first server said of itself; connects on first use."""
        self.connect()
        return self.clients[0].info

    def resolve_adapter(self, lora: str | None) -> tuple[str | None, Callable[[GenerateReply], GenerateReply]]:
        """Which adapter answers a request that names ``lora``, and what makes the replies say so.

        One that names none is answered with the trainer's, where it has sent one.
        """
        adapter = self.adapter  # an update may change it meanwhile
        if lora is not None or adapter is None:
            return lora, lambda reply: reply
        return adapter.name, partial(made_by, adapter.version)

    @property
    def vocab_size(self) -> int | None:
        """Number of valid token ids: the smallest over the servers."""
        return self._smallest("vocab_size")

    @property
    def max_prompt_tokens(self) -> int | None:
        """Longest prompt every server takes."""
        return self._smallest("max_prompt_tokens")

    @property
    def context_length(self) -> int | None:
        """Prompt plus response limit that holds on every server."""
        return self._smallest("context_length")

    def _smallest(self, name: str) -> int | None:
        self.connect()
        values = [getattr(client.info, name) for client in self.clients]
        return min((value for value in values if value is not None), default=None)

    @property
    def healthy(self) -> tuple[SGLangClient, ...]:
        """The servers that requests are routed to."""
        return tuple(client for client in self.clients if client.url not in self._quarantined)

    @property
    def quarantined(self) -> Mapping[str, str]:
        """Servers taken out of routing, with the reason."""
        return dict(self._quarantined)

    def quarantine(self, url: str, reason: str) -> None:
        """Take a server out of routing until :meth:`restore`."""
        with self._lock:
            if self._quarantined.get(url) != reason:
                _log.warning("%s is taken out of routing: %s", url, reason)
            self._quarantined[url] = reason
        self._deaths.forget(url)
        if self.router is not None:
            self.router.leave(url)

    def restore(self, url: str) -> None:
        """Put a server back into routing.

        Raises:
            ServerTimeoutError: the router does not take it in.
        """
        if self.router is not None:
            self.router.join([url])
        with self._lock:
            if self._quarantined.pop(url, None) is not None:
                _log.info("%s is back in routing", url)
        self._deaths.forget(url)

    @property
    def restarts(self) -> Mapping[str, int]:
        """How often each server was started retry: a new process is in no weight group and has no adapter loaded."""
        return dict(self._restarts)

    def note_restart(self, url: str) -> None:
        """Say that the server at ``url`` is a new process."""
        with self._lock:
            self._restarts[url] = self._restarts.get(url, 0) + 1
            self.offloaded_tags.pop(url, None)

    def refuse_while_offloaded(self) -> None:
        """Weights can't be sent to memory that is not there.

        Raises:
            ConfigError: a server's memory is lent out.
        """
        if self.offloaded_tags:
            raise ConfigError(f"the GPU memory of {', '.join(self.offloaded_tags)} is lent out: resume_memory() first")

    # ------------------------------------------------------------------ control

    def fan_out(
        self,
        build: Callable[[SGLangClient], HttpRequest],
        *,
        clients: Sequence[SGLangClient] | None = None,
        timeout_s: float | None = None,
    ) -> dict[str, Outcome[Any]]:
        """Send one control call to every server (or to ``clients``) at the same time.

        Returns:
            Per URL the outcome; nothing is raised, since what a failure means depends on the call.
        """
        targets = self.clients if clients is None else clients

        def call(client: SGLangClient) -> Callable[[], Any]:
            return lambda: client.send(build(client), timeout_s=timeout_s)

        return side_by_side({client.url: call(client) for client in targets})
