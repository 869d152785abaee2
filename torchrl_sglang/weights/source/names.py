"""Translate a trainer's tensor names into checkpoint names by comparing them with the checkpoint's.

Wrappers add attribute names in front (``model.model.layers...`` for a Hugging Face model in a TransformersWrapper) and
in between (``_orig_mod``, ``module``). They are not stripped blindly, because ``model.`` may be part of the checkpoint
name: the names of the checkpoint decide.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from torchrl_sglang.errors import ConfigError

__all__ = ["resolve_names", "without_wrappers"]

_WRAPPER_SEGMENTS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Attributes under which torch.compile, DDP, FSDP1 and activation checkpointing keep the module they wrap."""


def without_wrappers(name: str) -> str:
    """Remove the attributes that wrapper modules insert into ``name``.

    Examples:
        >>> without_wrappers("_orig_mod.model.layers.0.module.mlp.weight")
        'model.layers.0.mlp.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_SEGMENTS)


def resolve_names(names: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """Translate a trainer's names into ``known`` names by removing wrapper attributes and changing one common prefix.

    Args:
        names: the trainer's tensor names.
        known: the names of the checkpoint (and of its model, if they differ).

    Returns:
        Trainer's name to resolved name, in the order of ``names``. A name without a match only loses the prefix, so
        that the coverage check refuses it under a name the user recognises.

    Raises:
        ConfigError: two prefixes fit the names equally well (an actor's and a critic's).

    Examples:
        >>> known = {"model.embed.weight", "lm_head.weight"}
        >>> list(resolve_names(["model.model.embed.weight", "model.lm_head.weight", "model.extra"], known).values())
        ['model.embed.weight', 'lm_head.weight', 'extra']
    """
    known = known if isinstance(known, (set, frozenset, dict)) else set(known)
    # In a known name, a segment like "module" belongs to the name and not to a wrapper.
    clean = {name: name if name in known else without_wrappers(name) for name in names}
    removed, added = _common_prefix(clean.values(), known)
    resolved = {}
    for name, plain in clean.items():
        if plain.startswith(removed):
            candidate = added + plain[len(removed) :]
            resolved[name] = candidate if candidate in known or plain not in known else plain
        else:
            resolved[name] = plain
    return resolved


def _common_prefix(names: Iterable[str], known: Collection[str]) -> tuple[str, str]:
    """The prefix to remove from ``names`` and the prefix to add, so that most of them become ``known``.

    Returns:
        ``(removed, added)``, each empty or ending in a dot; at most one is not empty. ``("", "")`` if no prefix fits.

    Raises:
        ConfigError: two prefixes fit the same, highest number of names.

    Examples:
        >>> _common_prefix(["actor.a.w", "actor.b.w"], {"a.w", "b.w"})
        ('actor.', '')
        >>> _common_prefix(["layers.0.w"], {"model.layers.0.w"})
        ('', 'model.')
    """
    names = list(names)
    votes: Counter[tuple[str, str]] = Counter()
    for name in names:
        for start in _segment_starts(name):
            if name[start:] in known:
                votes[name[:start], ""] += 1
    if not votes:
        present = set(names)
        for name in known:
            for start in _segment_starts(name)[1:]:
                if name[start:] in present:
                    votes["", name[:start]] += 1
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


def _segment_starts(name: str) -> list[int]:
    """Positions at which a segment of a dotted name begins: 0 and behind each dot."""
    return [0, *(position + 1 for position, letter in enumerate(name) if letter == ".")]
