"""Settings as frozen keyword-only records that check themselves when they are made.

Other folders import the records and :func:`nearest_name` from this package, and checks for records of their own from
:mod:`.checking`. This folder imports ``errors`` only.
"""

from torchrl_sglang.config.checking import nearest_name
from torchrl_sglang.config.client import ClientConfig
from torchrl_sglang.config.router import RouterConfig
from torchrl_sglang.config.sampling import SamplingParams
from torchrl_sglang.config.server import ServerConfig
from torchrl_sglang.config.sync import SyncConfig

__all__ = ["ClientConfig", "RouterConfig", "SamplingParams", "ServerConfig", "SyncConfig", "nearest_name"]
