"""``torchrl-sglang doctor``: checks of the installation and of servers, and a self-test of a whole weight sync.

Other folders import the names below from this package. This folder imports everything but ``cli`` and ``recipes``.
"""

from torchrl_sglang.doctor.checks import Check, Diagnosis
from torchrl_sglang.doctor.environment import check_environment
from torchrl_sglang.doctor.self_test import self_test
from torchrl_sglang.doctor.server_check import check_server

__all__ = ["Check", "Diagnosis", "check_environment", "check_server", "self_test"]
