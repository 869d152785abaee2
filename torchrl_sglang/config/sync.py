"""Settings of a weight sync."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torchrl_sglang.config.checking import as_path, names_checked, require, require_numbers, words

__all__ = ["SyncConfig"]


@names_checked()
@dataclass(frozen=True, slots=True, kw_only=True)
class SyncConfig:
    """How weights reach the servers."""

    transport: Literal["auto", "broadcast", "ipc", "http", "disk", "lora"] = "auto"
    """``ipc``: memory shared with servers on this host; ``broadcast``: a process group of trainer and servers;
    ``http``: in the requests, for servers that nothing else reaches; ``disk``: a folder that all can read; ``lora``:
    the adapter only; ``auto``: ``ipc`` for servers that share this host's memory and ``broadcast`` for the others, both
    in one update, or ``disk`` where a server has replicas inside and ``disk_dir`` is set."""
    stage: Literal["auto", "off", "always"] = "auto"
    """Whether all weights are packed and checked before generation is paused, which takes memory for one copy of them
    and keeps it: ``auto`` does it in main memory where at least the same again stays free, never on a GPU."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Collective library: ``auto`` is NCCL when the servers run on GPUs, else gloo."""
    groups: Literal["auto", "shared", "per_server"] = "auto"
    """``per_server``: a process group with each server, so that none waits for another one; the trainer sends
    everything once per server. ``shared``: one group, in which servers also send to each other. ``auto`` is
    ``per_server`` with gloo and ``shared`` with NCCL."""
    bucket_bytes: int | None = None
    """Most bytes per bucket; a single larger tensor gets a bucket of its own. ``None`` is a 2,000th of the model, but
    at most 1 GiB and at least 64 MiB; with ``ipc`` and gloo at least 512 MiB, because a request costs more than in a
    GPU's memory. ``ipc`` takes smaller ones where ``/dev/shm`` has less room."""
    pause: Literal["auto", "abort", "retract", "in_place"] = "auto"
    """What happens to requests in flight: ``auto`` is ``abort`` when there are none, else ``retract``; SGLang before
    0.5.21 ends when its cache is flushed over retracted requests, so there ``auto`` is always ``abort``."""
    cache: Literal["flush", "salt"] = "flush"
    """``flush`` empties the prefix caches; ``salt`` leaves them and gives requests made through this pool a name space
    per update (what ``flush`` becomes under ``in_place``): requests of other processes, such as a collector's workers,
    may still use prefixes of the old weights."""
    verify: Literal["off", "probe", "full"] = "probe"
    """``probe`` compares every server's checksums of a sample of tensors with those of what was sent, and scores one
    fixed prompt on each; ``full`` compares the checksums of all tensors, which takes longer than a broadcast."""
    verify_share: float = 1 / 16
    """Share of the bytes that ``verify="probe"`` compares by checksum; the sample changes from sync to sync. Norms and
    biases are always part of it, and a model of up to 8 MB as a whole."""
    verify_atol: float | None = None
    """Largest log-prob difference that verification accepts; ``None`` is 1e-3 for float32, 0.5 for half precision. Of a
    mixture of experts in half precision the median counts, since rounding may choose another expert for a token."""
    name_map: Mapping[str, str] = field(default_factory=dict)
    """From the trainer's tensor names to the checkpoint's, for custom models; applied before every check."""
    ignore: tuple[str, ...] = ()
    """Names (``fnmatch`` patterns) that are neither required from the trainer nor sent."""
    blocking: bool = True
    """Whether a collector's update waits until the servers have the weights. If not, the next rollout may start, and
    the next update raises an error of this one; until then the trainer must not change the parameters."""
    only_trainable: bool = False
    """After the first full sync, send only parameters with ``requires_grad``."""
    check_values: bool = True
    """Refuse tensors that hold NaN or infinity."""
    master_address: str | None = None
    """Address at which servers reach the trainer; ``None`` is that of the interface that reaches the servers."""
    master_port: int | None = None
    """Port of the rendezvous store; ``None`` picks a free one. With a group per server (:attr:`groups`) there is one
    port per server, from this one on."""
    group_timeout_s: float = 60.0
    """To form the process group, and for the first bucket (NCCL makes its communicator then); 0.25 s more per rank."""
    bucket_timeout_s: float = 60.0
    """Longest time for one bucket, or longer for one that takes longer at ``assumed_bytes_per_s``. A gloo collective
    that hangs can be ended only after this time."""
    fixed_timeout_s: float = 60.0
    """Fixed part of a sync's deadline."""
    assumed_bytes_per_s: float = 100e6
    """Slowest expected transfer; a sync's deadline is ``fixed_timeout_s + bytes / assumed_bytes_per_s``, and 0.01 s
    more per bucket and server."""
    takeover: bool = False
    """End another trainer's unfinished update at once. Otherwise a sync waits until that trainer's process has ended,
    or, if it is on another host, until its update must have failed; if it runs, the sync is refused."""
    disk_dir: Path | None = None
    """Folder that trainer and servers share, for ``transport="disk"``."""

    def __post_init__(self) -> None:
        for name, allowed in _SYNC_CHOICES.items():
            value = getattr(self, name)
            require(value in allowed, f"{name} must be one of {allowed}, got {value!r}")
        times = ("group_timeout_s", "bucket_timeout_s", "fixed_timeout_s")
        require_numbers(self, *times, "assumed_bytes_per_s", "verify_atol", above=0)
        require_numbers(self, "bucket_bytes", at_least=1)
        require_numbers(self, "master_port", at_least=1, at_most=65535)
        require_numbers(self, "verify_share", above=0, at_most=1)
        object.__setattr__(self, "ignore", words("ignore", self.ignore))
        if self.disk_dir is not None:
            object.__setattr__(self, "disk_dir", as_path("disk_dir", self.disk_dir))
        if self.transport == "disk":
            require(self.disk_dir is not None, "transport='disk' needs disk_dir, a folder that all machines can read")

    def deadline_s(self, num_bytes: int, num_requests: int = 0) -> float:
        """Seconds a sync may take before it counts as failed.

        Args:
            num_bytes: what is sent, all copies together.
            num_requests: in how many requests: buckets times servers.

        Examples:
            >>> SyncConfig().deadline_s(10**9), SyncConfig().deadline_s(10**9, 2000 * 64)
            (70.0, 1350.0)
        """
        return self.fixed_timeout_s + num_bytes / self.assumed_bytes_per_s + _SECONDS_PER_REQUEST * num_requests

    def bucket_limit_s(self, num_bytes: int) -> float:
        """Seconds a bucket of ``num_bytes`` (all copies together) may take.

        Examples:
            >>> SyncConfig().bucket_limit_s(64 * 2**20), SyncConfig().bucket_limit_s(10 * 10**9)
            (60.0, 100.0)
        """
        return max(self.bucket_timeout_s, num_bytes / self.assumed_bytes_per_s)

    def group_limit_s(self, num_ranks: int) -> float:
        """Seconds a group of ``num_ranks`` may take to form.

        Examples:
            >>> SyncConfig().group_limit_s(2), SyncConfig().group_limit_s(1 + 64 * 8)
            (60.5, 188.25)
        """
        return self.group_timeout_s + _SECONDS_PER_RANK * num_ranks

    def bucket_size(self, num_bytes: int, *, in_main_memory: bool = False) -> int:
        """Most bytes per bucket for a model of ``num_bytes``.

        Args:
            num_bytes: of the whole model.
            in_main_memory: the servers read buckets from main memory or by gloo.

        Examples:
            >>> [SyncConfig().bucket_size(size) // 2**20 for size in (538 * 10**6, 140 * 10**9, 10**12, 2 * 10**12)]
            [64, 66, 476, 953]
            >>> SyncConfig().bucket_size(538 * 10**6, in_main_memory=True) // 2**20
            512
            >>> SyncConfig(bucket_bytes=1000).bucket_size(2 * 10**12)
            1000
        """
        if self.bucket_bytes is not None:
            return self.bucket_bytes
        smallest = _SMALLEST_IN_MAIN_MEMORY if in_main_memory else _SMALLEST_BUCKET
        return min(max(num_bytes // _MOST_BUCKETS, smallest), _LARGEST_BUCKET)


# A bucket costs each server an announcement, some milliseconds of the trainer's time; and memory on every rank.
_MOST_BUCKETS = 2000
_SMALLEST_BUCKET, _LARGEST_BUCKET = 64 * 2**20, 2**30
_SMALLEST_IN_MAIN_MEMORY = 512 * 2**20
"""A request costs a server some 8 ms beside loading (SmolLM2-135M, 538 MB: paused for 1.19 raw broadcasts with 9
buckets, for 0.69 with one)."""
_SECONDS_PER_REQUEST = 0.01
"""Ten times what the trainer needs to announce a bucket to a server and to read the reply."""
_SECONDS_PER_RANK = 0.25
"""A rank connects to all others, and NCCL measures the paths between them."""

_SYNC_CHOICES: dict[str, tuple[str, ...]] = {
    "transport": ("auto", "broadcast", "ipc", "http", "disk", "lora"),
    "stage": ("auto", "off", "always"),
    "backend": ("auto", "gloo", "nccl"),
    "groups": ("auto", "shared", "per_server"),
    "pause": ("auto", "abort", "retract", "in_place"),
    "cache": ("flush", "salt"),
    "verify": ("off", "probe", "full"),
}
