"""The attributes that TorchRL's LLM wrappers have, as read-only views of a policy's settings."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from torchrl_sglang.rollout.settings import RolloutSettings

__all__ = ["WrapperAttributes"]


class Setting:
    """An attribute that is read from ``policy.settings`` at every access and can't be assigned.

    Mappings are returned as read-only views, since a change to them would have no effect either.

    Args:
        name: the attribute of :class:`RolloutSettings` to read; ``None`` is the attribute's own name.

    Raises:
        AttributeError: on assignment, with the way to get a policy that has another value.
    """

    def __init__(self, name: str | None = None) -> None:
        self._name = name
        self._public_name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self._public_name = name
        self._name = self._name or name

    def __get__(self, policy: Any, owner: type | None = None) -> Any:
        if policy is None:
            return self
        value = getattr(policy.settings, str(self._name))
        return MappingProxyType(value) if isinstance(value, dict) else value

    def __set__(self, policy: Any, value: Any) -> None:
        raise AttributeError(
            f"{self._public_name!r} is fixed when the policy is made, so it can't be set to {value!r:.100}: "
            f"policy.get_new_version(...) makes a policy on the same servers with other arguments"
        )


class WrapperAttributes:
    """Public attributes of :class:`~torchrl.modules.llm.vLLMWrapper` and ``TransformersWrapper``.

    ``settings`` holds every value; this class stores none.
    """

    settings: RolloutSettings

    input_mode = Setting()
    input_key = Setting("source_key")
    attention_mask_key = Setting()
    generate = Setting()
    generate_kwargs = Setting()
    sampling_params = Setting("sampling")
    tokenizer_kwargs = Setting()
    pad_output = Setting()
    inplace = Setting("writes_inplace")
    device = Setting()
    layout = Setting()
    num_samples = Setting("samples")
    chat_template_name = Setting()
    chat_template = Setting()
    template_kwargs = Setting()
    prefer_tokens = Setting()
    batching = Setting("merges_calls")

    history_key = Setting()
    text_key = Setting()
    tokens_key = Setting()
    masks_key = Setting()
    log_probs_key = Setting()
    generation_key = Setting()
    policy_version_key = Setting()

    return_history = Setting("writes_history")
    return_text = Setting("writes_text")
    return_log_probs = Setting("writes_log_probs")

    @property
    def return_tokens(self) -> bool:
        """``True``: token ids are written in every input mode."""
        return True

    @property
    def return_masks(self) -> bool:
        """``True``: masks are written in every input mode."""
        return True

    @property
    def pad_model_input(self) -> bool:
        """``False``: servers take ragged input."""
        return False
