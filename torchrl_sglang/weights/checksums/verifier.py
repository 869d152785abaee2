"""Verifies a push by checksums: each server's hashes of a sample of tensors must be those of the bytes sent."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial

import torch

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SyncConfig
from torchrl_sglang.errors import ProtocolError, RequestRejectedError, SGLangError
from torchrl_sglang.parallel import Outcome, Task, side_by_side
from torchrl_sglang.pool import PoolState
from torchrl_sglang.protocol.checksums import RankChecksums, build_checksums, parse_checksums
from torchrl_sglang.weights.buckets.layout import Bucket
from torchrl_sglang.weights.checkpoint.headers import Checkpoint
from torchrl_sglang.weights.checksums.expected import (
    CheckpointTensors,
    ReadAgain,
    SentTensors,
    ServerKind,
    TensorHashes,
)
from torchrl_sglang.weights.checksums.rules import Finding, LayoutRules, TensorId, Verdict
from torchrl_sglang.weights.checksums.sampling import SampleChooser, skip_list
from torchrl_sglang.weights.checksums.server_tensors import FusedUnit, canonical_name, fused_units
from torchrl_sglang.weights.source.interface import WeightSource

__all__ = ["ChecksumVerifier", "PushChecksums"]

_log = logging.getLogger(__name__)

_MAX_LISTED = 5
_CHECKPOINT_VERSION = "default"
"""SGLang's version string of a server that nobody has updated: it holds its checkpoint's tensors."""


class ChecksumVerifier:
    """Makes a :class:`PushChecksums` for every push, and keeps what is learned of the servers from push to push.

    Args:
        state: the pool's records.
        config: ``verify`` and ``verify_share``.
    """

    def __init__(self, state: PoolState, config: SyncConfig) -> None:
        self.rules = LayoutRules()
        self.names_seen: dict[str, None] = {}
        self.unable: dict[str, str] = {}
        self.is_full = config.verify == "full"
        self._state = state
        self._chooser = SampleChooser(1.0 if self.is_full else config.verify_share)
        self._processes: dict[str, int] = {}
        self._units: tuple[Checkpoint, list[FusedUnit]] | None = None

    def begin(
        self,
        clients: Sequence[SGLangClient],
        checkpoint: Checkpoint,
        source: WeightSource,
        plan: Sequence[Bucket],
        served_dtype: torch.dtype | None,
    ) -> PushChecksums:
        """Choose the sample of a push.

        Args:
            clients: the servers.
            checkpoint: what they were started from.
            source: the trainer's weights.
            plan: the buckets that will be sent; for a source that can be read only once, those of the checkpoint.
            served_dtype: what the servers compute in, where a server does not say.
        """
        units = self._all_units(checkpoint)
        sent = {name for bucket in plan for name in bucket.names}
        readable = set() if source.one_shot or source.is_sharded else set(source.specs())
        usable = [
            unit
            for unit in units
            if sent.intersection(unit.parts) and all(part in sent or part in readable for part in unit.parts)
        ]
        new = [client for client in clients if self._is_new(client)]
        kinds = {client.url: _kind(client, checkpoint, served_dtype) for client in clients if self._is_able(client)}
        sample = self._chooser.choose(usable, plan)
        return PushChecksums(self, self._state, clients, kinds, checkpoint, source, units, sample, new)

    def _all_units(self, checkpoint: Checkpoint) -> list[FusedUnit]:
        if self._units is None or self._units[0] is not checkpoint:
            names = [name for name in checkpoint.specs if not checkpoint.is_server_computed(name)]
            self._units = checkpoint, fused_units(names, tied=checkpoint.tied)
        return self._units[1]

    def _is_new(self, client: SGLangClient) -> bool:
        """Whether this is the first push to the process at a server's address."""
        restarts = self._state.server(client.url).restarts
        if self._processes.get(client.url) == restarts:
            return False
        self._processes[client.url] = restarts
        self.rules.forget_values(client.url)
        self.unable.pop(client.url, None)
        return True

    def _is_able(self, client: SGLangClient) -> bool:
        if client.info.quantization is not None:
            self.unable[client.url] = f"it quantises its weights ({client.info.quantization})"
        return client.url not in self.unable


def _kind(client: SGLangClient, checkpoint: Checkpoint, served_dtype: torch.dtype | None) -> ServerKind:
    dtype = getattr(torch, client.info.dtype, None)
    text_config = checkpoint.config.get("text_config")
    config = text_config if isinstance(text_config, Mapping) else checkpoint.config
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    return ServerKind(
        tp_size=client.info.tp_size,
        dtype=dtype if isinstance(dtype, torch.dtype) else served_dtype,
        device=client.info.device,
        heads=heads if isinstance(heads, int) else None,
        kv_heads=kv_heads if isinstance(kv_heads, int) and kv_heads > 0 else None,
    )


class PushChecksums:
    """The checksums of one push.

    Its calls, in order: :meth:`read_before`, :meth:`take` for every bucket, :meth:`start_reading`, :meth:`compare`.

    Attributes:
        verdict: what :meth:`compare` has found.
        unable: servers that were not checked, and why.
    """

    def __init__(
        self,
        verifier: ChecksumVerifier,
        state: PoolState,
        clients: Sequence[SGLangClient],
        kinds: Mapping[str, ServerKind],
        checkpoint: Checkpoint,
        source: WeightSource,
        units: Sequence[FusedUnit],
        sample: Sequence[FusedUnit],
        new: Sequence[SGLangClient],
    ) -> None:
        self.verdict = Verdict()
        self.unable = verifier.unable
        self._verifier = verifier
        self._urls = {client.url for client in clients}
        self._checkpoint = checkpoint
        self._kinds = dict(kinds)
        self._units = units
        self._sample = sample
        self._new = [client for client in new if client.url in kinds]
        self._held_checkpoint = {url for url in kinds if state.server(url).version == _CHECKPOINT_VERSION}
        self._unit_named = {name: unit for unit in sample for name in unit.server_names}
        # A sharded source is gathered only while the other ranks take part.
        self._sent = SentTensors(sample, self._hash_now) if source.one_shot or source.is_sharded else None
        parts = ReadAgain(source).parts if self._sent is None else self._sent.parts
        self._hashes = TensorHashes(self._kinds, parts)
        self._reading: Task[dict[str, Outcome[list[RankChecksums]]]] | None = None

    def read_before(self) -> None:
        """Read the hashes of servers that are updated for the first time. What fails here fails in the push, too."""
        if not self._sample:
            return
        for url, outcome in self._read(self._new).items():
            if isinstance(outcome.error, RequestRejectedError | ProtocolError):
                if not self._verifier.is_full:
                    self.unable[url] = _unable(outcome.error)
            elif outcome.value is not None:
                self._verifier.rules.seen_before_push(self._findings(url, outcome.value))

    def take(self, bucket: Bucket, flat: torch.Tensor) -> None:
        """Keep the sample's tensors of a packed bucket, if they can't be read again."""
        if self._sent is not None:
            self._sent.take(bucket, flat)

    def start_reading(self, clients: Sequence[SGLangClient]) -> None:
        """Ask the servers for their hashes after the push, and return at once."""
        able = [client for client in clients if client.url in self._kinds and client.url not in self.unable]
        if self._sample and able:
            self._reading = Task(lambda: self._read(able), name="read-checksums")

    def compare(self) -> tuple[dict[str, str], dict[str, SGLangError]]:
        """Compare what the servers answer with the hashes of what was sent.

        Returns:
            Per server that does not hold what was sent, what it does not hold; and per server that did not answer, the
            error.
        """
        if self._reading is None:
            return {}, {}
        for unit in self._sample:  # while the servers compute theirs
            self._hash_now(unit)
        ranks: dict[str, list[RankChecksums]] = {}
        failed: dict[str, SGLangError] = {}
        for url, outcome in self._reading.outcome().unwrap().items():
            if outcome.value is not None:
                ranks[url] = outcome.value
            elif isinstance(outcome.error, RequestRejectedError | ProtocolError) and not self._verifier.is_full:
                self.unable[url] = _unable(outcome.error)
            elif outcome.error is not None:
                failed[url] = outcome.error
        return self._complaints(ranks), failed

    def _complaints(self, ranks: Mapping[str, Sequence[RankChecksums]]) -> dict[str, str]:
        findings = [finding for url, of_url in ranks.items() for finding in self._findings(url, of_url)]
        findings.sort(key=lambda finding: finding.unit.name)  # each unit is read once
        self.verdict = self._verifier.rules.judge(findings, self._hashes, self._held_before())
        complaints = {}
        for url in ranks:
            stale = [str(tensor) for tensor in self.verdict.stale if tensor.url == url]
            if stale:
                more = f" and {len(stale) - _MAX_LISTED} more" if len(stale) > _MAX_LISTED else ""
                listed = ", ".join(stale[:_MAX_LISTED])
                complaints[url] = f"{url} does not hold what was sent, by its checksums of {listed}{more}"
        if self._verifier.is_full:
            for url, different in _different_replicas(ranks, self._kinds).items():
                complaints.setdefault(url, different)
        if self.verdict.unproven:
            names = sorted({tensor.name for tensor in self.verdict.unproven})
            _log.info("how the servers hold %d tensors is not known: %s", len(names), ", ".join(names[:_MAX_LISTED]))
        return complaints

    def _held_before(self) -> TensorHashes | None:
        """Hashes of the checkpoint, for servers that held it before this push."""
        if self._checkpoint.path is None or not self._held_checkpoint:
            return None
        kinds = {url: kind for url, kind in self._kinds.items() if url in self._held_checkpoint}
        return TensorHashes(kinds, CheckpointTensors(self._checkpoint.path).parts)

    @property
    def not_compared(self) -> dict[str, str]:
        """Servers whose checksums were not compared, and tensors of which they say nothing, each with the reason."""
        servers = {url: reason for url, reason in self.unable.items() if url in self._urls}
        tensors = {each.name: "how the servers hold it is not known" for each in self.verdict.unproven}
        return {**servers, **tensors}

    # ------------------------------------------------------------------ the servers' hashes

    def _read(self, clients: Sequence[SGLangClient]) -> dict[str, Outcome[list[RankChecksums]]]:
        verifier = self._verifier
        skip = skip_list(self._units, self._sample, verifier.names_seen)
        request = build_checksums(skip)

        def read(client: SGLangClient) -> list[RankChecksums]:
            ranks = parse_checksums(client.send(request), server=client.url)
            verifier.names_seen.update(dict.fromkeys(name for rank in ranks for name in rank.hashes))
            return ranks

        return side_by_side({client.url: partial(read, client) for client in clients}) if clients else {}

    def _findings(self, url: str, ranks: Sequence[RankChecksums]) -> list[Finding]:
        """The hashes whose unit in the checkpoint is known."""
        alike: dict[str, FusedUnit | None] = {}
        for name, unit in self._unit_named.items():
            alike[canonical_name(name)] = None if canonical_name(name) in alike else unit
        findings = []
        for position, rank in enumerate(ranks):
            for name, value in rank.hashes.items():
                is_exact = name in self._unit_named
                found = self._unit_named[name] if is_exact else alike.get(canonical_name(name))
                if found is not None:
                    tensor = TensorId(url=url, name=name, rank=position, tp_rank=rank.tp_rank)
                    findings.append(self._finding(tensor, found, value, is_exact=is_exact))
        return findings

    def _finding(self, tensor: TensorId, unit: FusedUnit, value: str = "", *, is_exact: bool = True) -> Finding:
        shapes = tuple(self._checkpoint.specs[part].shape for part in unit.parts)
        return Finding(tensor=tensor, unit=unit, is_exact=is_exact, shapes=shapes, actual=value)

    def _hash_now(self, unit: FusedUnit) -> None:
        """Compute the hashes of a unit in the known layout, or in the likeliest."""
        for url, kind in self._kinds.items():
            for tp_rank in range(kind.tp_size):
                tensor = TensorId(url=url, name=unit.name, rank=tp_rank, tp_rank=tp_rank)
                layout = self._verifier.rules.layout(self._finding(tensor, unit).kind)
                next(self._hashes.of(unit, tensor, layout), None)


def _unable(error: SGLangError) -> str:
    return f"it does not report checksums: {error}"


def _different_replicas(
    ranks: Mapping[str, Sequence[RankChecksums]], kinds: Mapping[str, ServerKind]
) -> dict[str, str]:
    """Servers whose hashes differ from those of the first server of their kind."""
    first: dict[ServerKind, str] = {}
    complaints = {}
    for url, of_url in ranks.items():
        other = first.setdefault(kinds[url], url)
        theirs, ours = _by_rank(ranks[other]), _by_rank(of_url)
        different = sorted({key[1] for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)})
        if different:
            complaints[url] = f"{url} holds other weights than {other}: {', '.join(different[:_MAX_LISTED])}"
    return complaints


def _by_rank(ranks: Sequence[RankChecksums]) -> dict[tuple[int, str], str]:
    return {(position, name): value for position, rank in enumerate(ranks) for name, value in rank.hashes.items()}
