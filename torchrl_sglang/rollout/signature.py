"""The policy's constructor as help, editors and the documentation show it."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields

from torchrl_sglang.rollout.settings import RolloutSettings

__all__ = ["policy_signature"]


def policy_signature() -> inspect.Signature:
    """``model``, then every field of :class:`RolloutSettings` as a keyword argument with its default.

    Examples:
        >>> list(policy_signature().parameters)[:3]
        ['model', 'tokenizer', 'input_mode']
    """
    model = inspect.Parameter(
        "model", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation="AsyncSGLang | SGLangPool | str | Sequence[str]"
    )
    keywords = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None if field.default is MISSING else field.default,  # an empty mapping: the same as None
            annotation=field.type,
        )
        for field in fields(RolloutSettings)
    ]
    return inspect.Signature([model, *keywords])
