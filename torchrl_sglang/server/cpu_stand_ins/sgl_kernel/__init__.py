"""Stand-in for the CPU build of sgl-kernel, which is not on a package index.

Under ``SGLANG_USE_CPU_ENGINE=1`` SGLang (0.5.23) imports these names. They are for speculative decoding and for moving
KV caches, which plain generation does not use; calling one raises an error that names what is missing.
"""

import os

_NAMES = (
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_draft_decode_metadata_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "rotate_input_ids_cpu",
    "verify_tree_greedy_cpu",
)


def _missing(name):
    def function(*args, **kwargs):
        raise NotImplementedError(
            f"sgl_kernel.{name} exists only in a real build of sgl-kernel; this server runs without one. "
            "Switch off what needs it (speculative decoding, hierarchical cache)."
        )

    function.__name__ = name
    return function


globals().update({name: _missing(name) for name in _NAMES})

if os.environ.get("SGLANG_CPU_STAND_INS_NO_PINNED_MEMORY") == "1":
    import _pinned_memory

    _pinned_memory.ignore_requests()
