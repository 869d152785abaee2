"""TensorDict in, TensorDict out: prompts are read, generated or scored by the servers, and written back."""

from torchrl_sglang.rollout.generation import Generation
from torchrl_sglang.rollout.log_probs import behaviour_log_probs, temper, trainer_log_probs
from torchrl_sglang.rollout.policy import SGLangWrapper

__all__ = ["Generation", "SGLangWrapper", "behaviour_log_probs", "temper", "trainer_log_probs"]
