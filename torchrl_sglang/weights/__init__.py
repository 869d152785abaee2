"""A trainer's weights on their way to the servers. May import: pool, client, protocol, config; never rollout or engine.

Inside, each folder imports only those before it: ``checkpoint``, ``source``, ``buckets``, ``group``, ``update``,
``transports``; then ``sync.py`` and ``scheme.py``.
"""

from torchrl_sglang.weights.scheme import SGLangWeightSender, SGLangWeightSyncScheme
from torchrl_sglang.weights.sync import WeightSync
from torchrl_sglang.weights.update.report import SyncReport

__all__ = ["SGLangWeightSender", "SGLangWeightSyncScheme", "SyncReport", "WeightSync"]
