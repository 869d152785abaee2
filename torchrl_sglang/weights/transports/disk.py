"""The transport over a shared folder: a checkpoint is written atomically, and all servers are told to load it.

Slower than a broadcast, but it needs no process group: for servers behind a network that collectives can't cross, for a
trainer and a server on one GPU, and for ``dp_size > 1`` inside one server. What is written is a whole checkpoint that
transformers can load too.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SyncConfig
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.pool import SavedWeights, SGLangPool
from torchrl_sglang.protocol.version import WeightVersion
from torchrl_sglang.weights.buckets.packing import BucketPacker
from torchrl_sglang.weights.transports.base import PackedBuckets, Packing
from torchrl_sglang.weights.update.session import UpdateSession

__all__ = ["DiskTransport"]

_KEPT_VERSIONS = 2
"""A server that restarts while a sync runs may still be reading the version before."""

_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
"""What lies beside the weights in a checkpoint: configuration and tokenizer."""


class DiskTransport:
    """Writes ``disk_dir/version-N`` and has every server load it.

    Args:
        pool: the servers.
        config: ``disk_dir`` is the folder, under the same path on every machine.
        checkpoint_path: folder whose configuration and tokenizer files are put beside the weights; ``None`` if the
            servers' checkpoint is no local folder: then only weights are written.
    """

    name = "disk"

    def __init__(self, pool: SGLangPool, config: SyncConfig, checkpoint_path: Path | None) -> None:
        if config.disk_dir is None:
            raise ConfigError("the disk transport needs SyncConfig.disk_dir, a folder that trainer and servers share")
        self._folder = config.disk_dir
        self._pool = pool
        self._config = config
        self._checkpoint_path = checkpoint_path

    def connect(self, clients: Sequence[SGLangClient]) -> None:
        """Make the folder.

        Raises:
            ConfigError: it can't be written to.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"can't write to SyncConfig.disk_dir {self._folder}: {error.strerror}") from error

    def send(
        self,
        clients: Sequence[SGLangClient],
        packing: Packing,
        version: WeightVersion,
        deadline: float,
        *,
        num_buckets: int | None,
    ) -> UpdateSession:
        """Write, tell, prune. See :meth:`WeightTransport.send`."""
        start = time.monotonic()
        self.connect(clients)
        packed = packing(BucketPacker("cpu"))
        session = UpdateSession(self._pool, clients, version=version, config=self._config, deadline=deadline)
        try:
            target = self._write(packed, version, session)
        finally:
            packed.close()
        session.seconds["prepare"] = time.monotonic() - start
        with session:
            session.load_from_disk(str(target))
        self._pool.saved = SavedWeights(version=version, path=str(target))
        self._prune(target)
        return session

    def drop(self) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is held; the checkpoints stay."""

    def _write(self, packed: PackedBuckets, version: WeightVersion, session: UpdateSession) -> Path:
        """Write under another name first: a folder called ``version-N`` is whole."""
        target = (self._folder / f"version-{version.number}").resolve()
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            places: dict[str, str] = {}
            for index, (bucket, flat) in enumerate(packed, start=1):
                file = f"model-{index:05d}.safetensors"
                views = zip(bucket.names, bucket.views(flat), strict=True)
                # safetensors refuses tensors that share memory, as the views of a bucket do.
                save_file({name: view.clone() for name, view in views}, partial / file, metadata={"format": "pt"})
                places |= dict.fromkeys(bucket.names, file)
                session.num_bytes += flat.nbytes
                session.num_buckets += 1
            session.num_tensors = len(places)
            index_file = {"metadata": {"total_size": session.num_bytes}, "weight_map": places}
            (partial / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=1))
            self._add_companions(partial)
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return target

    def _add_companions(self, partial: Path) -> None:
        if self._checkpoint_path is None:
            return
        for pattern in _COMPANIONS:
            for file in self._checkpoint_path.glob(pattern):
                if not file.name.endswith(".safetensors.index.json"):
                    shutil.copy(file, partial / file.name)

    def _prune(self, newest: Path) -> None:
        numbered = [path for path in self._folder.glob("version-*") if path.name.removeprefix("version-").isdigit()]
        older = sorted(numbered, key=lambda path: path.stat().st_mtime)
        for path in [path for path in older if path.resolve() != newest][: -(_KEPT_VERSIONS - 1)]:
            shutil.rmtree(path, ignore_errors=True)
