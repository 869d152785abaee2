"""``SGLangWeightSender``: the object with an ``update_weights()`` that TorchRL's trainers push weights through."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.weights.update.report import SyncReport

if TYPE_CHECKING:
    from torchrl_sglang.weights.scheme import SGLangWeightSyncScheme

__all__ = ["SGLangWeightSender"]


class SGLangWeightSender:
    """Sends one model's weights to SGLang servers each time it is told to.

    TorchRL's ``GRPOTrainer(weight_sync_sender=...)`` and ``UpdateWeights(sender=...)`` take such an object, and its own
    SGLang and vLLM backends make them with the same methods. :meth:`SGLangWeightSyncScheme.create_sender` makes ours.

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
        """Say whose weights :meth:`update_weights` sends: anything :meth:`WeightSync.push` takes more than once."""
        self._model = model

    def register_collector(self, collector: Any) -> None:
        """Have a collector's policy version counted up with each update, where it counts (``PolicyVersion``)."""
        self._collectors.append(collector)

    def init_all_workers_group(self, model_metadata: Any = None) -> None:
        """Make the process group now; otherwise the first update does.

        Args:
            model_metadata: what TorchRL's own backends want to be told here; the servers' checkpoint is read instead.

        Raises:
            ConfigError: the servers can't take weights on this transport.
            WeightUpdateError: a server did not join.
        """
        self._scheme.sync.connect()

    def update_weights(self, weights: Any = None) -> SyncReport | None:
        """Send the weights. The servers serve them when this returns, unless ``SyncConfig(blocking=False)``.

        Args:
            weights: what to send instead of the registered model.

        Returns:
            What was done; ``None`` when it goes on in the background.

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

    def flush_cache(self) -> bool:
        """Nothing is left to flush: every update empties the servers' prefix caches, or salts them with its version."""
        return True

    def shutdown(self) -> None:
        """Take the process group down and forget model and collectors. The servers go on serving."""
        self._scheme.shutdown()
        self._model = None
        self._collectors.clear()
