"""Whose name is that: from a trainer's tensor names to checkpoint names, by matching and never by blind stripping.

Wrappers put attribute names in front (``model.model.layers...`` for a Hugging Face model in a TransformersWrapper) and
in between (``_orig_mod``, ``module``). What has to go is found by comparing with the names the checkpoint is known to
have, because ``model.`` may just as well belong to the name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from torchrl_sglang.errors import ConfigError

__all__ = ["WRAPPER_SEGMENTS", "common_prefix", "resolve_names", "without_wrappers"]

WRAPPER_SEGMENTS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Attributes under which torch.compile, DDP, FSDP1 and activation checkpointing keep the module they wrap."""


def without_wrappers(name: str) -> str:
    """``name`` without the attributes that wrapper modules insert.

    Examples:
        >>> without_wrappers("_orig_mod.model.layers.0.module.mlp.weight")
        'model.layers.0.mlp.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPER_SEGMENTS)


def resolve_names(names: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """Translate a trainer's names into ``known`` ones as far as one common prefix and wrapper attributes explain them.

    Args:
        names: the trainer's tensor names.
        known: the names of the checkpoint (and of its model, if they differ).

    Returns:
        Trainer's name to resolved name, in the order of ``names``. A name that nothing explains keeps its tail behind
        the common prefix: the coverage check is the one to refuse it, under the name the user will recognise.

    Raises:
        ConfigError: two prefixes explain the names equally well (an actor and a critic), so any choice were a guess.

    Examples:
        >>> known = {"model.embed.weight", "lm_head.weight"}
        >>> list(resolve_names(["model.model.embed.weight", "model.lm_head.weight", "model.extra"], known).values())
        ['model.embed.weight', 'lm_head.weight', 'extra']
    """
    known = known if isinstance(known, (set, frozenset, dict)) else set(known)
    # A segment like "module" is a wrapper's only where the name isn't known with it.
    clean = {name: name if name in known else without_wrappers(name) for name in names}
    removed, added = common_prefix(clean.values(), known)
    resolved = {}
    for name, plain in clean.items():
        if plain.startswith(removed):
            candidate = added + plain[len(removed) :]
            resolved[name] = candidate if candidate in known or plain not in known else plain
        else:
            resolved[name] = plain
    return resolved


def common_prefix(names: Iterable[str], known: Collection[str]) -> tuple[str, str]:
    """The prefix to take off ``names`` and the one to put on, so that most of them become ``known``.

    Returns:
        ``(removed, added)``, each empty or ending in a dot; at most one is not empty. ``("", "")`` when nothing fits.

    Raises:
        ConfigError: two different prefixes fit the most names.

    Examples:
        >>> common_prefix(["actor.a.w", "actor.b.w"], {"a.w", "b.w"})
        ('actor.', '')
        >>> common_prefix(["layers.0.w"], {"model.layers.0.w"})
        ('', 'model.')
    """
    names = list(names)
    votes: Counter[tuple[str, str]] = Counter()
    for name in names:
        for cut in _cuts(name):
            if name[cut:] in known:
                votes[name[:cut], ""] += 1
    if not votes:
        present = set(names)
        for name in known:
            for cut in _cuts(name)[1:]:
                if name[cut:] in present:
                    votes["", name[:cut]] += 1
    if not votes:
        return "", ""
    (best, count), *others = votes.most_common()
    rivals = [pair for pair, other_count in others if other_count == count]
    if rivals and ("", "") not in (best, *rivals):
        found = " and ".join(repr(pair[0] or pair[1]) for pair in (best, *rivals))
        raise ConfigError(
            f"the names under {found} fit the served checkpoint equally well, so which of these models to send would "
            "be a guess: pass the one model whose weights the server should get"
        )
    return ("", "") if rivals else best


def _cuts(name: str) -> list[int]:
    """Where a tail of whole segments may begin: 0 and behind each dot."""
    return [0, *(position + 1 for position, letter in enumerate(name) if letter == ".")]
