"""Which tensors of the checkpoint make up which tensor of a server.

Source: SGLang 0.5.23, the ``stacked_params_mapping`` of its model files and ``FusedMoE.make_expert_params_mapping``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torchrl_sglang.weights.checkpoint.headers import is_output_embedding

__all__ = ["FusedUnit", "canonical_name", "fused_units", "kind_of"]

Fusion = Literal["none", "rows", "expert_gate_up", "expert_down"]

_STACKED = re.compile(r"^(?P<module>.*)\.(?P<part>q_proj|k_proj|v_proj|gate_proj|up_proj)\.(?P<what>weight|bias)$")
_EXPERT = re.compile(
    r"^(?P<module>.*\.experts)\.(?P<index>\d+)\.(?P<part>gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$"
)
_STACKS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_DOWN = ("down_proj", "w2")
_GATE_BEFORE_UP = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1}
_WRAPPERS = re.compile(r"^(?:(?:model|transformer|language_model|base_model)\.)+")


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedUnit:
    """Tensors of the checkpoint that a server may hold as one.

    Attributes:
        name: the server's name of the whole.
        parts: checkpoint names, in the order in which they are fused.
        fusion: how they are fused. ``rows``: one below the other; ``expert_gate_up``: per expert, first its gate, then
            its up projection; ``expert_down``: one per expert.
        aliases: other names of a server for the same tensor.
    """

    name: str
    parts: tuple[str, ...]
    fusion: Fusion = "none"
    aliases: tuple[str, ...] = ()

    @property
    def server_names(self) -> tuple[str, ...]:
        """Names under which a server may hold the unit or, where it fuses nothing, its parts."""
        parts = self.parts if self.fusion == "rows" else ()
        return (self.name, *self.aliases, *parts)


def fused_units(names: Iterable[str], *, tied: bool = False) -> list[FusedUnit]:
    """Group checkpoint names into the units that SGLang fuses.

    Args:
        names: all names of the checkpoint.
        tied: whether the output embedding is the input embedding.

    Examples:
        >>> for unit in fused_units(["a.q_proj.weight", "a.v_proj.weight", "a.k_proj.weight", "norm.weight"]):
        ...     print(unit.name, unit.parts)
        a.qkv_proj.weight ('a.q_proj.weight', 'a.k_proj.weight', 'a.v_proj.weight')
        norm.weight ('norm.weight',)
    """
    known = dict.fromkeys(names)
    units: dict[str, FusedUnit] = {}
    experts: dict[str, list[tuple[int, int, str]]] = {}
    for name in known:
        expert = _EXPERT.match(name)
        if expert:
            part = expert["part"]
            fused = f"{expert['module']}.{'w2_weight' if part in _DOWN else 'w13_weight'}"
            experts.setdefault(fused, []).append((int(expert["index"]), _GATE_BEFORE_UP.get(part, 0), name))
            units.setdefault(fused, FusedUnit(name=fused, parts=()))  # keeps the order
            continue
        unit = _stacked(name, known) or FusedUnit(name=name, parts=(name,), aliases=_tied_names(name, known, tied))
        units.setdefault(unit.name, unit)
    for fused, parts in experts.items():
        fusion: Fusion = "expert_down" if fused.endswith("w2_weight") else "expert_gate_up"
        units[fused] = FusedUnit(name=fused, parts=tuple(name for *_, name in sorted(parts)), fusion=fusion)
    return list(units.values())


def _stacked(name: str, known: Mapping[str, None]) -> FusedUnit | None:
    match = _STACKED.match(name)
    if match is None:
        return None
    module, what = match["module"], match["what"]
    for fused, stack in _STACKS.items():
        parts = tuple(f"{module}.{part}.{what}" for part in stack)
        if match["part"] in stack and all(part in known for part in parts):
            return FusedUnit(name=f"{module}.{fused}.{what}", parts=parts, fusion="rows")
    return None


def _tied_names(name: str, known: Mapping[str, None], tied: bool) -> tuple[str, ...]:
    """A server may hold a tied output embedding as a tensor of its own, filled from the input embedding."""
    is_input = name.endswith(("embed_tokens.weight", "wte.weight", "word_embeddings.weight"))
    return ("lm_head.weight",) if tied and is_input and not any(is_output_embedding(each) for each in known) else ()


def canonical_name(name: str) -> str:
    """A name without the wrappers around a language model, which differ between checkpoints and servers.

    Examples:
        >>> canonical_name("transformer.h.0.ln_1.weight") == canonical_name("h.0.ln_1.weight")
        True
    """
    return _WRAPPERS.sub("", name).replace(".base_layer.", ".")


def kind_of(name: str) -> str:
    """A name without its layer's number: tensors of one kind are laid out alike.

    Examples:
        >>> kind_of("model.layers.11.mlp.down_proj.weight")
        'model.layers.N.mlp.down_proj.weight'
    """
    return re.sub(r"\.\d+\.", ".N.", name)
