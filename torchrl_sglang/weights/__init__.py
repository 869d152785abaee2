"""Weight sync: reads a trainer's weights, checks them and sends them to the servers.

Other folders import the names below from this package; engine and doctor also import helpers from its modules. This
folder imports pool, client, protocol, config, errors and ``parallel``, never rollout or engine. Inside, each folder
imports only those before it: ``checkpoint``, ``source``, ``buckets``, ``checksums``, ``group``, ``update``,
``shared_memory``, ``transports``; then come
``planning.py``, ``sync.py`` and ``scheme.py``.
"""

from torchrl_sglang.weights.scheme import SGLangWeightSender, SGLangWeightSyncScheme
from torchrl_sglang.weights.sync import WeightSync
from torchrl_sglang.weights.update.report import SyncReport

__all__ = ["SGLangWeightSender", "SGLangWeightSyncScheme", "SyncReport", "WeightSync"]
