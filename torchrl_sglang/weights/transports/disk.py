"""Transport ``disk``: a whole checkpoint is written to a shared folder, and all servers load it.

Slower than a broadcast, but it needs no process group: for servers behind a network that collectives can't cross, for
trainer and server on one GPU, and for ``dp_size > 1`` inside one server. transformers can load the checkpoint too.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from safetensors.torch import save_file

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SyncConfig
from torchrl_sglang.disk_space import writing
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.pool import SavedWeights, SGLangPool
from torchrl_sglang.protocol.version import WeightVersion
from torchrl_sglang.weights.buckets.packing import BucketPacker
from torchrl_sglang.weights.group.trainer_mark import TrainerMark
from torchrl_sglang.weights.transports.base import PackedWeights
from torchrl_sglang.weights.update.report import SyncReport
from torchrl_sglang.weights.update.session import UpdateSession

__all__ = ["DiskTransport"]

_KEPT_VERSIONS = 2
"""A server that restarts while a sync runs may still be reading the version before."""

_PARTIAL = ".partial-"
_ABANDONED_AFTER_S = 3600.0
"""A trainer on another host that has written nothing to a folder for so long is dead."""

_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
"""Configuration and tokenizer files, which lie beside the weights in a checkpoint."""


class DiskTransport:
    """Writes ``disk_dir/version-N-OWNER`` and makes every server load it. Trainers may share a folder.

    Args:
        pool: the servers.
        config: ``disk_dir`` is the folder, under the same path on every machine.
        owner: id of this trainer, part of the folders' names.
        checkpoint_path: folder whose configuration and tokenizer files are copied beside the weights; ``None`` if the
            servers' checkpoint is no local folder: then only weights are written.

    Raises:
        ConfigError: ``config`` names no folder.
    """

    name = "disk"

    def __init__(self, pool: SGLangPool, config: SyncConfig, owner: str, checkpoint_path: Path | None) -> None:
        if config.disk_dir is None:
            raise ConfigError("transport='disk' needs SyncConfig.disk_dir, a folder that trainer and servers share")
        self._folder = config.disk_dir
        self._pool = pool
        self._config = config
        self._owner = owner
        self._checkpoint_path = checkpoint_path
        self._staged: SavedWeights | None = None

    @property
    def packer(self) -> BucketPacker:
        """Packs buckets in main memory."""
        return BucketPacker("cpu")

    def connect(self, clients: Sequence[SGLangClient]) -> None:
        """Make the folder, and remove what trainers left that died while they wrote.

        Raises:
            ConfigError: it can't be written to.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"can't write to SyncConfig.disk_dir {self._folder}: {error.strerror}") from error
        for path in self._folder.glob(f"version-*{_PARTIAL}*"):
            if _is_abandoned(path):
                shutil.rmtree(path, ignore_errors=True)

    def stage(self, packed: PackedWeights, version: WeightVersion, report: SyncReport) -> None:
        """Write the checkpoint."""
        self._staged = SavedWeights(version=version, path=str(self._write(packed, version, report)))

    def open_session(
        self, clients: Sequence[SGLangClient], version: WeightVersion, deadline: float, report: SyncReport
    ) -> UpdateSession:
        """Pauses the servers. See :meth:`WeightTransport.open_session`."""
        return UpdateSession(
            self._pool, clients, version=version, config=self._config, deadline=deadline, report=report
        )

    def send(self, session: UpdateSession, packed: PackedWeights, deadline: float) -> None:
        """Make the servers load what :meth:`stage` has written, then delete older versions."""
        assert self._staged is not None, "stage() comes first"
        session.load_from_disk(self._staged.path)
        self._pool.state.weights_saved(self._staged)
        self._prune(Path(self._staged.path))

    def close(self) -> None:
        """The checkpoints stay."""

    def _write(self, packed: PackedWeights, version: WeightVersion, report: SyncReport) -> Path:
        """Write under another name first: a folder called ``version-N-OWNER`` is complete, and never changed.

        Raises:
            StorageError: the disk is full, or can't be written to; no server was told anything.
        """
        target = self._unused(f"version-{version.number}-{version.owner}")
        partial = target.with_name(f"{target.name}{_PARTIAL}{TrainerMark.own(version.owner or '')}")
        shutil.rmtree(partial, ignore_errors=True)
        remains = (
            f"The incomplete folder was removed; no server was told anything, and all keep their weights. The last "
            f"{_KEPT_VERSIONS} versions stay in {self._folder} beside the one that is written."
        )
        with writing(
            target,
            f"the weights of version {version.number}",
            incomplete=partial,
            needed_bytes=self._expected_bytes(),
            remains=remains,
        ):
            partial.mkdir(parents=True)
            files: dict[str, str] = {}
            for index, (bucket, flat) in enumerate(packed, start=1):
                file = f"model-{index:05d}.safetensors"
                views = zip(bucket.names, bucket.views(flat), strict=True)
                # safetensors refuses tensors that share memory, as the views of a bucket do.
                save_file({name: view.clone() for name, view in views}, partial / file, metadata={"format": "pt"})
                files |= dict.fromkeys(bucket.names, file)
            index_file = {"metadata": {"total_size": report.num_bytes}, "weight_map": files}
            (partial / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=1))
            self._add_companions(partial)
            partial.rename(target)
        return target

    def _expected_bytes(self) -> int | None:
        """Size of a version: that of the newest one, else of the servers' checkpoint; ``None`` if there is neither."""
        complete = (path for path in self._folder.glob("version-*") if _PARTIAL not in path.name)
        folders = sorted(complete, key=_written_at, reverse=True)
        for folder in [*folders, *([self._checkpoint_path] if self._checkpoint_path else [])]:
            with suppress(OSError):  # another trainer may be deleting it
                size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
                if size:
                    return size
        return None

    def _unused(self, name: str) -> Path:
        """A path that does not exist. A server may be loading from one that does: a version can be pushed twice."""
        names = itertools.chain([name], (f"{name}.{count}" for count in itertools.count(2)))
        return next(path for each in names if not (path := (self._folder / each).resolve()).exists())

    def _add_companions(self, partial: Path) -> None:
        if self._checkpoint_path is None:
            return
        for pattern in _COMPANIONS:
            for file in self._checkpoint_path.glob(pattern):
                if not file.name.endswith(".safetensors.index.json"):
                    shutil.copy(file, partial / file.name)

    def _prune(self, newest: Path) -> None:
        """Delete this trainer's older versions."""
        own = re.compile(rf"version-\d+-{re.escape(self._owner)}(\.\d+)?")
        versions = [path for path in self._folder.glob("version-*") if own.fullmatch(path.name)]
        older = sorted(versions, key=_written_at)
        for path in [path for path in older if path.resolve() != newest][: -(_KEPT_VERSIONS - 1)]:
            shutil.rmtree(path, ignore_errors=True)


def _written_at(path: Path) -> float:
    """When a folder was last changed; 0 if it has just been deleted, as another trainer may do with its own."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _is_abandoned(partial: Path) -> bool:
    """Whether the trainer that was writing a folder is dead: it has ended, or has written nothing for long."""
    mark = TrainerMark.parse(partial.name.partition(_PARTIAL)[2])
    if mark.is_alive() is not None:
        return not mark.is_alive() and mark != TrainerMark.own(mark.group)
    try:
        newest = max(path.stat().st_mtime for path in (partial, *partial.iterdir()))
        with tempfile.NamedTemporaryFile(dir=partial.parent, prefix=".clock-") as now:  # the clock that wrote `newest`
            return Path(now.name).stat().st_mtime - newest > _ABANDONED_AFTER_S
    except OSError:  # it has just been renamed, or nothing can be written here
        return False
