"""The policy: reads prompts from a TensorDict, has servers generate or score, and writes the results back.

May be imported from here: the names in ``__all__``; they are also in the package root.
"""

from torchrl_sglang.rollout.generation import Generation
from torchrl_sglang.rollout.log_probs import behaviour_log_probs, temper, trainer_log_probs
from torchrl_sglang.rollout.policy import SGLangWrapper

__all__ = ["Generation", "SGLangWrapper", "behaviour_log_probs", "temper", "trainer_log_probs"]
