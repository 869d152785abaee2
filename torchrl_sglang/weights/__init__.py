"""From a trainer's weights to bytes on the wire: sources, coverage, buckets, group, session, scheme, proof."""

from torchrl_sglang.weights.scheme import SGLangWeightSyncScheme
from torchrl_sglang.weights.sender import SGLangWeightSender
from torchrl_sglang.weights.sync import WeightSync
from torchrl_sglang.weights.update.report import SyncReport

__all__ = ["SGLangWeightSender", "SGLangWeightSyncScheme", "SyncReport", "WeightSync"]
