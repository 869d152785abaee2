"""``/weights_checker``: hashes of the tensors that a server holds, under its own (fused) names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchrl_sglang.errors import ProtocolError
from torchrl_sglang.protocol.messages import HttpRequest

__all__ = ["RankChecksums", "build_checksums", "parse_checksums"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankChecksums:
    """The hashes of one rank of a server.

    Attributes:
        tp_rank: its tensor-parallel rank.
        hashes: 16 hex digits per tensor, by the server's name.
    """

    tp_rank: int
    hashes: Mapping[str, str]


def build_checksums(skip: Sequence[str] = ()) -> HttpRequest:
    """Hash the tensors of a server, on every rank.

    Args:
        skip: a tensor is left out if its name contains one of these strings.
    """
    body: dict[str, Any] = {"action": "checksum", "selector": "target"}
    if skip:
        body["skip_tensor_list"] = list(skip)
    return HttpRequest(method="POST", path="/weights_checker", body=body, timeout="update", repeatable=True)


def parse_checksums(answer: Any, *, server: str) -> list[RankChecksums]:
    """Read the answer to :func:`build_checksums`.

    Raises:
        ProtocolError: it has another form.

    Examples:
        >>> answer = {"ranks": [{"checksums": {"w": "00ff"}, "parallelism_info": [{"tp_rank": 0}]}]}
        >>> parse_checksums(answer, server="http://a:30000")
        [RankChecksums(tp_rank=0, hashes={'w': '00ff'})]
    """
    ranks = answer.get("ranks") if isinstance(answer, Mapping) else None
    if not isinstance(ranks, list) or not all(isinstance(rank, Mapping) and "checksums" in rank for rank in ranks):
        raise ProtocolError(f"{server} answered /weights_checker without checksums per rank", server=server)
    return [
        RankChecksums(tp_rank=_tp_rank(rank, position), hashes=dict(rank["checksums"]))
        for position, rank in enumerate(ranks)
    ]


def _tp_rank(rank: Mapping[str, Any], position: int) -> int:
    places = rank.get("parallelism_info") or [{}]
    place = places[0] if isinstance(places, list) else places
    return int(place.get("tp_rank", position))
