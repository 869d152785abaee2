"""``torchrl-sglang doctor``: what is here, what fits what, and a proof of the whole transport that anyone can run."""

from torchrl_sglang.doctor.checks import Check, Diagnosis
from torchrl_sglang.doctor.environment import check_environment
from torchrl_sglang.doctor.self_test import self_test
from torchrl_sglang.doctor.server_check import check_server

__all__ = ["Check", "Diagnosis", "check_environment", "check_server", "self_test"]
