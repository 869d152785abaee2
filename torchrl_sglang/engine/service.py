"""``AsyncSGLang``: launches or attaches to servers, generates, and sends weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import ClientConfig, RouterConfig
from torchrl_sglang.engine.fleet import Launcher
from torchrl_sglang.engine.generation import EngineGeneration
from torchrl_sglang.engine.launching import LocalLauncher, client_config, refuse_unknown, server_configs
from torchrl_sglang.engine.members import EngineMembers
from torchrl_sglang.engine.memory import ALL_TAGS, EngineMemory, MemoryTag
from torchrl_sglang.engine.monitor import CrashMonitor, admit, restart_server
from torchrl_sglang.engine.weights import EngineWeights
from torchrl_sglang.errors import ConfigError, ServerStartError, SGLangError
from torchrl_sglang.pool import RouterClient, SGLangPool
from torchrl_sglang.pool.earlier_weights import warn_of_earlier_weights
from torchrl_sglang.progress import shown_progress
from torchrl_sglang.server import SGLangRouter, SGLangServer, start_fleet, stop_fleet
from torchrl_sglang.weights.transports.auto import TransportChoice
from torchrl_sglang.weights.update.report import SyncReport

if TYPE_CHECKING:
    import torch

__all__ = ["AsyncSGLang"]


class AsyncSGLang(EngineMembers, EngineGeneration):
    """One or more SGLang servers of one model: launched here, or running elsewhere.

    Use :meth:`from_pretrained` to launch servers and :meth:`connect` to attach to running ones. A launched engine
    owns its processes and ends them on :meth:`shutdown`, at the end of a ``with`` block and at exit; a pickled copy
    attaches to the same servers and owns nothing.

    Attributes:
        pool: the servers as one (:class:`~torchrl_sglang.SGLangPool`).
        router: the router process this engine launched, if any.
        weights: sends weights to the servers (:class:`~torchrl_sglang.engine.weights.EngineWeights`).
        memory: releases and resumes their GPU memory (:class:`~torchrl_sglang.engine.memory.EngineMemory`).

    Examples:
        Attach to a running server::

            with AsyncSGLang.connect("http://127.0.0.1:30000") as engine:
                reply = engine.generate("The capital of France is", max_new_tokens=8)
                print(reply.text, reply.finish_reason, reply.output_logprobs)
                replies = engine.generate(input_ids=[[1, 5, 6], [1, 7]], temperature=0, max_new_tokens=4)
                for so_far in engine.stream("Hello", max_new_tokens=8):
                    print(so_far.text)

        Launch two, each on a GPU of its own, and send them a trained model::

            with AsyncSGLang.from_pretrained("Qwen/Qwen3-0.6B", dp_size=2, restart="on-failure") as engine:
                engine.update_weights(model)
                replies = engine.generate_batch(["The capital of France is", "Two and two are"], max_new_tokens=8)
    """

    def __init__(
        self,
        pool: SGLangPool,
        servers: Sequence[SGLangServer] = (),
        *,
        router: SGLangRouter | None = None,
        restart: Literal["on-update", "on-failure", "never"] = "on-update",
        launcher: Launcher | None = None,
    ) -> None:
        EngineMembers.__init__(self, pool, servers, launcher)
        EngineGeneration.__init__(self, pool)
        self.router = router
        self.weights = EngineWeights(pool, self.restart)
        self.memory = EngineMemory(pool)
        self._restart = restart
        self._monitor = CrashMonitor(self) if restart == "on-failure" and servers else None

    # ------------------------------------------------------------------ making one

    @classmethod
    def connect(cls, url: str | Sequence[str], *, router: str | None = None, **client: Any) -> AsyncSGLang:
        """Attach to running servers.

        Args:
            url: base URL, or one per server.
            router: base URL of an sglang-router for generation; the servers are made its workers. Start it with
                ``--disable-retries``: by itself it sends a request again that may still be running.
            **client: fields of :class:`~torchrl_sglang.ClientConfig`: ``api_key``, ``api_key_file``, time-outs...

        Raises:
            ConfigError: a bad URL, an unknown argument, or servers of different models.
            ServerUnreachableError: nothing listens there.
            ProtocolError: something that is not an SGLang server listens there.
        """
        refuse_unknown(client, [f.name for f in fields(ClientConfig)], attaching=True)
        config = ClientConfig(**client)
        urls: list[Any] = list(url) if isinstance(url, (list, tuple)) else [url]  # anything else is refused by name
        router_client = RouterClient(router, config) if router is not None else None
        pool = SGLangPool([SGLangClient(each, config) for each in urls], router=router_client)
        pool.connect()
        warn_of_earlier_weights(pool)
        return cls(pool)

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        tp_size: int = 1,
        dp_size: int = 1,
        gpus: Sequence[Sequence[int]] | None = None,
        router: bool | RouterConfig = False,
        restart: Literal["on-update", "on-failure", "never"] = "on-update",
        progress: Callable[[str], None] | bool | None = None,
        client: ClientConfig | None = None,
        **server: Any,
    ) -> AsyncSGLang:
        """Launch servers and wait until they are ready.

        Args:
            model: path or hub name of the checkpoint; ``"SmolLM2"`` is a small chat model for a machine without a GPU,
                downloaded on first use (see :func:`~torchrl_sglang.smollm2_checkpoint`).
            tp_size: tensor-parallel ranks per server.
            dp_size: number of servers. Several servers are the only form of data parallelism that can take weight
                updates, so SGLang's own ``--dp-size`` is not used.
            gpus: GPUs of each server, e.g. ``[[0, 1], [2, 3]]``; by default server ``i`` takes the next ``tp_size``.
            router: put an ``sglang-router`` before the servers. It chooses the server of each prompt by the servers'
                caches and load, also for clients other than this one (``engine.router.url``); control
                calls still go to the servers.
            restart: when a server that crashed is restarted. ``"on-update"``: by the next weight update, which it takes
                part in. ``"on-failure"``: at once, with a warning that shows the end of its log. It serves as soon as
                it holds the current weights: at once if these are the checkpoint's or were synced through a shared
                folder, otherwise after the next weight update. ``"never"``: this engine does not restart it.
            progress: called with a line of text while the servers load; ``True`` shows it on standard error, ``False``
                shows nothing, ``None`` shows it on a terminal.
            client: how to talk to the servers; their keys are filled in.
            **server: fields of :class:`~torchrl_sglang.ServerConfig` (vLLM's ``max_model_len``,
                ``gpu_memory_utilization``, ... are translated); SGLang's other flags go into ``extra_args``.

        Raises:
            ConfigError: an unknown or impossible argument, before anything is launched.
            ServerStartError: a server did not become ready; all are ended, the log's tail is in the error.
        """
        if restart not in ("on-update", "on-failure", "never"):
            raise ConfigError(f"restart must be 'on-update', 'on-failure' or 'never', got {restart!r}")
        configs = server_configs(model, tp_size=tp_size, dp_size=dp_size, gpus=gpus, given=server)
        config = client_config(client, configs[0])
        with contextlib.ExitStack() as on_failure:
            process = router_client = None
            if router:
                process = SGLangRouter(router if isinstance(router, RouterConfig) else RouterConfig()).start()
                on_failure.callback(process.stop)
                router_client = RouterClient(process.url, config)
            with shown_progress(progress) as show:
                servers = start_fleet(configs, progress=show)
            on_failure.callback(stop_fleet, servers, kill=True)
            pool = SGLangPool([SGLangClient(each.url, config) for each in servers], router=router_client)
            pool.connect()
            on_failure.pop_all()
        return cls(pool, servers, router=process, restart=restart, launcher=LocalLauncher(configs[0]))

    # ------------------------------------------------------------------ what it is

    @property
    def api_key(self) -> str | None:
        """The servers' key, for other clients (``Authorization: Bearer KEY``); ``None`` if they have none.

        Servers that this package launches get a random one, unless a key or ``api_key=False`` is given.
        """
        return self.pool.clients[0].config.api_key

    @property
    def weight_version(self) -> int:
        """Version number of the weights that the last finished sync put on the servers."""
        return self.pool.weight_version

    def get_tp_size(self) -> int:
        """Tensor-parallel ranks of one server."""
        return self.pool.info.tp_size

    def get_dp_size(self) -> int:
        """Number of servers."""
        return len(self.pool.clients)

    # ------------------------------------------------------------------ weights and memory, under the names people know

    def update_weights(self, weights: Any) -> SyncReport | None:
        """Send weights to all servers: see :meth:`EngineWeights.update_weights`."""
        return self.weights.update_weights(weights)

    def update_weights_from_distributed(
        self, name: str, dtype: torch.dtype, shape: Sequence[int], tensor: torch.Tensor
    ) -> SyncReport | None:
        """Send one tensor: see :meth:`EngineWeights.update_weights_from_distributed`."""
        return self.weights.update_weights_from_distributed(name, dtype, shape, tensor)

    def init_weight_update_group(
        self, master_address: str | None = None, master_port: int | None = None
    ) -> dict[str, TransportChoice]:
        """Make the process group now, if one is needed: see :meth:`EngineWeights.init_weight_update_group`."""
        return self.weights.init_weight_update_group(master_address, master_port)

    def get_model_metadata(self) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """Names, dtypes and shapes that :meth:`update_weights` expects."""
        return self.weights.get_model_metadata()

    def get_master_address(self) -> str:
        """The trainer's address that the servers are told to join at."""
        return self.weights.get_master_address()

    def get_master_port(self) -> int | None:
        """The port that they are told; ``None`` when a free one is chosen."""
        return self.weights.get_master_port()

    def offloaded(self, tags: Sequence[MemoryTag] = ALL_TAGS) -> AbstractContextManager[None]:
        """The servers hold no GPU memory during this block: see :meth:`EngineMemory.offloaded`."""
        return self.memory.offloaded(tags)

    def release_memory(self, tags: Sequence[MemoryTag] = ALL_TAGS) -> None:
        """Make all servers release GPU memory: see :meth:`EngineMemory.release`."""
        self.memory.release(tags)

    def resume_memory(self, tags: Sequence[MemoryTag] = ALL_TAGS) -> None:
        """Make all servers allocate again what they have released: see :meth:`EngineMemory.resume`."""
        self.memory.resume(tags)

    # ------------------------------------------------------------------ life

    def restart(self, url: str) -> bool:
        """Restart the server at ``url``, at the same address and with the checkpoint that it was launched from.

        Where synced weights have replaced the checkpoint's, it serves nothing until the next weight update. A weight
        update under way is waited for.

        Returns:
            ``False`` if this engine did not launch it, or was told never to restart: then nothing is done.

        Raises:
            ConfigError: GPU memory is offloaded.
            ServerStartError: it did not become ready again, or is being restarted by somebody else.
        """
        server = next((server for client, server in self.launched if client.url == url), None)
        client = next((each for each in self.pool.clients if each.url == url), None)
        if client is None or server is None or self._restart == "never":
            return False
        lock, state = self.pool.update_lock, self.pool.state
        if lock.is_helper and self._monitor is not None and server.has_crashed:
            self._monitor.look(self)  # the update does not wait for the start
        with lock.held_for(f"a restart of {url}"):  # an update that finds a dead server calls this in its threads
            self.pool.refuse_while_offloaded()
            if not state.restart_begun(url):
                raise ServerStartError(f"{url} is being restarted already", server=url)
            self.pool.quarantine(url, "it is being restarted")
        try:
            is_current = restart_server(self.pool, client, server)
        except SGLangError as error:
            self.pool.quarantine(url, f"it could not be restarted ({error})")
            raise
        with lock.held_for(f"a restart of {url}"):
            if state.server(url).weights != "new":
                admit(self.pool, client, is_current=is_current, update=False)
        return True

    def shutdown(self) -> None:
        """Close connections and end the servers this engine launched. Safe to call twice.

        Whatever can't be closed, also on Ctrl-C, the servers are ended.
        """
        if self._monitor is not None:
            self._monitor.announce_end()
        with contextlib.ExitStack() as steps:  # the last one first
            if self._monitor is not None:
                steps.callback(self._end_processes)  # those that were just being restarted
                steps.callback(self._monitor.join)
            steps.callback(self._end_processes)
            steps.callback(self.pool.close)
            steps.callback(self.weights.close)
            steps.callback(self._end_changes)

    def _end_processes(self) -> None:
        with contextlib.ExitStack() as steps:
            steps.callback(stop_fleet, self.servers, kill=True)  # nothing to save, and SIGTERM takes up to 10 s
            if self.router is not None:
                steps.callback(self.router.stop)

    def __enter__(self) -> AsyncSGLang:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()

    def __getstate__(self) -> dict[str, Any]:
        return {"pool": self.pool}  # a copy attaches; processes and tokenizer stay with the original

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["pool"])  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"AsyncSGLang({[client.url for client in self.pool.clients]}, owns={len(self.servers)})"
