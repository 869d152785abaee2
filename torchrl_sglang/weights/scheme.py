"""``SGLangWeightSyncScheme``: what a TorchRL collector calls when the policy's weights changed.

Private names of torchrl's base class are used here and nowhere else in ``weights``.
"""

from __future__ import annotations

import weakref
from dataclasses import fields
from typing import Any

from torchrl.weight_update import weight_sync_schemes as _host
from torchrl.weight_update.weight_sync_schemes import WeightSyncScheme

from torchrl_sglang.config import SyncConfig
from torchrl_sglang.config.foreign_names import SCHEME_ARGUMENTS, unknown_argument
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.pool import Servers, SGLangPool, resolve_pool
from torchrl_sglang.pool.earlier_weights import warn_of_earlier_weights
from torchrl_sglang.weights.sync import WeightSync
from torchrl_sglang.weights.update.report import SyncReport

__all__ = ["SGLangWeightSender", "SGLangWeightSyncScheme"]

_ELSEWHERE = {"config=SyncConfig({name}=...)": [field.name for field in fields(SyncConfig)]}


class SGLangWeightSyncScheme(WeightSyncScheme):
    """Sends a policy's weights to SGLang servers whenever the collector is told to update them.

    Args:
        servers: an :class:`~torchrl_sglang.AsyncSGLang`, an :class:`~torchrl_sglang.SGLangPool`, or the URL(s) of
            running servers.
        model: when given, its weights are sent as soon as the collector connects, so that the first rollout already
            uses them; otherwise the servers serve what they were started with until the first update.
        config: how weights travel; see :class:`~torchrl_sglang.SyncConfig`. ``None`` takes what the servers' engine or
            another scheme uses already, or the defaults.

    Raises:
        ConfigError: ``servers`` is none of these, or others send weights to them with another config.

    The collector passes on what ``update_policy_weights_`` was given: a module, a nested TensorDict, or a flat dict of
    tensors. The servers hold the new weights when the call returns, or it raises.

    Examples:
        >>> collector = Collector(env, policy, frames_per_batch=64,
        ...                       weight_sync_schemes={"policy": SGLangWeightSyncScheme(engine)})   # doctest: +SKIP
        >>> collector.update_policy_weights_(actor)                                                 # doctest: +SKIP
    """

    def __init__(
        self, servers: Servers | None = None, *, model: Any = None, config: SyncConfig | None = None, **unknown: Any
    ) -> None:
        super().__init__("tensordict")
        for name in unknown:
            hint = unknown_argument(
                name, ("servers", "model", "config"), foreign=SCHEME_ARGUMENTS, elsewhere=_ELSEWHERE
            )
            raise ConfigError(f"SGLangWeightSyncScheme has no argument {name!r}.{hint}")
        if servers is None:
            raise ConfigError("servers must be an AsyncSGLang, an SGLangPool or URLs, and none were given")
        self.pool = resolve_pool(servers)
        if not isinstance(self.pool, SGLangPool):
            raise ConfigError(f"servers must be an AsyncSGLang, an SGLangPool or URLs, got {type(servers).__name__}")
        self._config = config
        self._restart = getattr(servers, "restart", None)
        self._initial_weights = model
        # Made now, so that the engine uses this config from its first update on. It sends nothing and connects nothing.
        self._sync: WeightSync | None = None
        self._sync = self.sync

    @property
    def sync(self) -> WeightSync:
        """The pool's weight sync, shared with the engine and other schemes."""
        self._sync = WeightSync.of(self.pool, self._config, user=self, restart=self._restart)
        return self._sync

    @property
    def config(self) -> SyncConfig:
        """How weights travel."""
        return self._config or self.sync.config

    @property
    def last_report(self) -> SyncReport | None:
        """What the last successful sync did."""
        return None if self._sync is None else self._sync.last_report

    def attach(self, collector: Any) -> SGLangWeightSyncScheme:
        """Serve a collector whose constructor takes no ``weight_sync_schemes``: ``LLMCollector``, ``RayLLMCollector``.

        A ``RayLLMCollector`` would ship the weights to its actor; the broadcast has to start in the trainer's process,
        so from now on its ``update_policy_weights_`` sends from here and increments the actor's policy version. If
        the collector tracks versions, this waits for the rollout under way, unless the actor has a second thread
        (``remote_config={"max_concurrency": 2}``).

        Args:
            collector: the collector.

        Returns:
            This scheme.

        Raises:
            ConfigError: a collector of an unknown kind, or one in another process with ``transport="lora"``.

        Examples:
            >>> scheme = SGLangWeightSyncScheme(engine).attach(LLMCollector(env, policy=policy))  # doctest: +SKIP
        """
        if hasattr(collector, "_setup_weight_sync"):
            if not hasattr(collector, "_collector"):
                collector._setup_weight_sync(None, {"policy": self})
                return self
            _refuse_adapters_elsewhere(self.config)
            self.init_on_sender(model_id="policy", context=None)
            self.connect()
            collector.update_policy_weights_ = _RemoteUpdate(self, collector)
            return self
        raise ConfigError(
            f"a {type(collector).__name__} can't be given a scheme afterwards: pass weight_sync_schemes={{'policy': "
            "scheme}} to its constructor"
        )

    def connect(self, *, worker_idx: int | None = None, weights: Any | None = None) -> None:
        """Reach the servers, and send them the weights that the scheme has for them. Collectors call it.

        Without a collector it does the same: servers that hang in the update of a dead trainer are freed by it.

        Args:
            worker_idx: number of the worker process, when one calls it.
            weights: sent instead of ``model``.

        Raises:
            ServerError: a server can't be reached, or hangs for another reason.
            SGLangError: as :meth:`WeightSync.push`, if there are weights to send.
        """
        if self.initialized_on_sender or self.initialized_on_receiver:
            super().connect(**({"weights": weights} if worker_idx is None else {"worker_idx": worker_idx}))
        else:
            self._setup_connection_and_weights_on_sender_impl(weights=weights)

    def create_sender(self) -> SGLangWeightSender:
        """Make the sender that TorchRL's trainers take: ``GRPOTrainer(weight_sync_sender=scheme.create_sender())``."""
        return SGLangWeightSender(self)

    def wait(self) -> None:
        """Wait for an update under way in the background (``SyncConfig(blocking=False)``).

        Raises:
            SGLangError: it failed.
        """
        if self._sync is not None:
            self._sync.wait()

    # ------------------------------------------------------------------ the sender: the trainer's process

    def _init_on_sender_impl(self, model_id: str | None = None, context: Any = None, **kwargs: Any) -> None:
        """Called by every kind of collector, with its own extras.

        Multi-process collectors call it before they start their workers: it must open nothing that they would inherit.

        Raises:
            ConfigError: workers in other processes, and ``transport="lora"``.
        """
        if kwargs:  # how to start workers
            _refuse_adapters_elsewhere(self.config)
        self.model_id = model_id or "policy"
        self.context = context
        self._register_worker_sender(worker_idx=0)

    def create_transport(self, **kwargs: Any) -> _Transport:
        """Make the one transport for all servers, which are updated together."""
        return _Transport(self)

    def prepare_weights(self, weights: Any, model_id: str, strategy: Any, context: Any = None) -> Any:
        """Return the weights unchanged: verification calls a module, and can't call a TensorDict made from it.

        Raises:
            ConfigError: no weights were given. The collector's own policy is the wrapper, which holds none.
        """
        if weights is None or (hasattr(weights, "is_empty") and weights.is_empty()):
            raise ConfigError(
                "no weights to send: the collector's policy generates on SGLang servers and holds none itself. Pass "
                "the trained model: collector.update_policy_weights_(model)"
            )
        return weights

    def _iterate_transports(self, worker_ids: int | list[int] | None = None) -> Any:
        """Workers share the servers: an update for any workers is sent to the servers once."""
        return super()._iterate_transports(None)

    def _setup_connection_and_weights_on_sender_impl(
        self, *, worker_idx: int | None = None, weights: Any | None = None
    ) -> None:
        weights = weights if weights is not None else self._initial_weights
        self._initial_weights = None
        if weights is not None:
            self.sync.push(weights)
        else:
            self.sync.reach()
            warn_of_earlier_weights(self.pool)

    # ------------------------------------------------------------------ the receiver: a collector's worker process

    def _init_on_receiver_impl(self, model_id: str, context: Any = None, **kwargs: Any) -> None:
        """Workers only talk to the servers; nothing arrives at them."""
        self.model_id = model_id
        self.worker_idx = kwargs.get("worker_idx")
        self.context = context

    def _setup_connection_and_weights_on_receiver_impl(self, *, worker_idx: int | None = None) -> None:
        """Nothing to set up in a worker."""

    # ------------------------------------------------------------------ life

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        state["_sync"] = None
        state["_restart"] = None
        state["_initial_weights"] = None  # only the sender uses it, and a model is large
        state["_sender_transports"] = None
        state["_receiver_transport"] = None
        state["_shared_transport"] = None
        return state

    def shutdown(self) -> None:
        """Destroy the process group, unless the engine or another scheme uses it. The servers go on serving."""
        super().shutdown()
        sync = getattr(self, "_sync", None)  # torchrl's finalizer comes here even after a constructor that failed
        if sync is not None:
            self._sync = None
            sync.release(self)


class SGLangWeightSender:
    """Sends one model's weights to SGLang servers whenever :meth:`update_weights` is called.

    The object for TorchRL's ``GRPOTrainer(weight_sync_sender=...)`` and ``UpdateWeights(sender=...)``, with the methods
    of the senders of TorchRL's SGLang and vLLM backends. :meth:`SGLangWeightSyncScheme.create_sender` makes it.

    Args:
        scheme: knows the servers and how weights travel.

    Examples:
        >>> sender = SGLangWeightSyncScheme(engine).create_sender()                               # doctest: +SKIP
        >>> sender.register_model(actor)                                                          # doctest: +SKIP
        >>> trainer = GRPOTrainer(collector=collector, weight_sync_sender=sender, ...)            # doctest: +SKIP
    """

    def __init__(self, scheme: SGLangWeightSyncScheme) -> None:
        self._scheme = scheme
        self._model: Any = None
        self._collectors: list[Any] = []

    def register_model(self, model: Any) -> None:
        """Set the model that :meth:`update_weights` sends: whatever :meth:`WeightSync.push` can read repeatedly."""
        self._model = model

    def register_collector(self, collector: Any) -> None:
        """Increment a collector's policy version with each update, if it tracks one (``PolicyVersion``)."""
        self._collectors.append(collector)

    def init_all_workers_group(self, model_metadata: Any = None) -> None:
        """Make the process group now; otherwise the first update does.

        Args:
            model_metadata: not needed: names and shapes come from the servers' checkpoint. TorchRL's backends need it.

        Raises:
            ConfigError: the servers can't take weights by this transport.
            WeightUpdateError: a server did not join.
        """
        self._scheme.sync.connect()

    def update_weights(self, weights: Any = None) -> SyncReport | None:
        """Send the weights. The servers serve them when this returns, unless ``SyncConfig(blocking=False)``.

        Args:
            weights: what to send instead of the registered model.

        Returns:
            What was done; ``None`` when it continues in the background.

        Raises:
            ConfigError: no model was registered and no weights given.
            SGLangError: as :meth:`WeightSync.push`.
        """
        given = self._model if weights is None else weights
        if given is None:
            raise ConfigError("no weights to send: register_model(model) first, or update_weights(model)")
        self._scheme.create_transport().send_weights(given)
        for collector in self._collectors:
            collector.increment_version()
        return self._scheme.last_report if self._scheme.config.blocking else None

    def shutdown(self) -> None:
        """Shut the scheme down and forget model and collectors. The servers go on serving."""
        self._scheme.shutdown()
        self._model = None
        self._collectors.clear()


class _Transport:
    """TorchRL's transport contract; the work is done by :class:`WeightSync`."""

    def __init__(self, scheme: SGLangWeightSyncScheme) -> None:
        self._scheme = scheme

    def send_weights(self, weights: Any) -> None:
        if self._scheme.config.blocking:
            self._scheme.sync.push(weights)
        else:
            self._scheme.sync.push_in_background(weights)

    def receive_weights(self, timeout: float | None = None, **kwargs: Any) -> None:
        return None

    def setup_connection_and_weights_on_sender(self) -> None:
        return None

    def setup_connection_and_weights_on_receiver(self, **kwargs: Any) -> None:
        return None


class _RemoteUpdate:
    """``update_policy_weights_`` of a collector that lives in another process."""

    def __init__(self, scheme: SGLangWeightSyncScheme, collector: Any) -> None:
        self._scheme = scheme
        self._collector = weakref.ref(collector)  # the collector holds us
        # Read once: each read waits for the rollout that the actor is busy with.
        self._counts = collector.policy_version is not None

    def __call__(self, policy_or_weights: Any = None, *, weights: Any = None, policy: Any = None, **_: Any) -> None:
        given = next((each for each in (policy_or_weights, weights, policy) if each is not None), None)
        self._scheme.send(given)
        collector = self._collector()
        if collector is not None and self._counts:
            collector.increment_version()


def _refuse_adapters_elsewhere(config: SyncConfig) -> None:
    if config.transport == "lora":
        raise ConfigError(
            "transport='lora' gives each adapter a name of its own, and policies in other processes don't learn it: "
            "they would go on with the base model. Use a collector in this process, or transport='broadcast', which "
            "merges the adapter into the weights"
        )


# torchrl 0.12 has no registry of schemes by name.
if hasattr(_host, "register_weight_sync_backend"):
    _host.register_weight_sync_backend("sglang")(SGLangWeightSyncScheme)
