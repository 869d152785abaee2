"""Makes torch ignore requests for pinned host memory, which exists only with an accelerator.

SGLang's LoRA code always requests it, so CPU servers with adapters need this patch; other servers don't.
"""

import functools

import torch
from torch.utils._device import _device_constructors


def ignore_requests():
    """Drop ``pin_memory=`` from torch's constructors and make ``Tensor.pin_memory()`` return the tensor itself."""
    # `with torch.device("meta")` recognises constructors by identity, in a set that is filled on first use: fill it
    # before the functions are replaced.
    _device_constructors()
    for name in ("tensor", "empty", "zeros", "ones", "full", "arange"):
        setattr(torch, name, _without_pinning(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self


def _without_pinning(constructor):
    @functools.wraps(constructor)
    def unpinned(*args, **kwargs):
        kwargs.pop("pin_memory", None)
        return constructor(*args, **kwargs)

    return unpinned
