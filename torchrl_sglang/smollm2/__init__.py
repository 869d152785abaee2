"""SmolLM2-135M-Instruct, a real chat model small enough for a CPU, from the package index instead of a model hub.

Wherever this package takes a model, the name ``SmolLM2`` means this one. May import: ``errors``, ``progress``,
``cached_folder``.
"""

from torchrl_sglang.smollm2.checkpoint import is_smollm2, smollm2_checkpoint

__all__ = ["is_smollm2", "smollm2_checkpoint"]
