"""What other trainers have left on the servers: their updates are ended if they are dead, and respected if they run."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from functools import partial

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.errors import WeightUpdateError
from torchrl_sglang.parallel import side_by_side
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.control import build_destroy_group
from torchrl_sglang.weights.group.rendezvous import group_name
from torchrl_sglang.weights.group.trainer_mark import TrainerMark

__all__ = ["OtherTrainers"]

_log = logging.getLogger(__name__)

_POLL_S = 0.2
_DESTROY_TIMEOUT_S = 5.0


class OtherTrainers:
    """Ends what dead trainers have left behind.

    Args:
        pool: the servers.
        owner: id of this trainer.
        takeover: end updates of other trainers, dead or not.
    """

    def __init__(self, pool: SGLangPool, owner: str, *, takeover: bool) -> None:
        self._pool = pool
        self._owner = owner
        self._takeover = takeover

    def end_dead_updates(self, suspects: Sequence[SGLangClient], patience_s: float | None) -> bool:
        """Make all servers leave the process groups of trainers that died in an update.

        gloo's broadcast is a tree: a server may wait for another server that has long seen the trainer's death. When
        that one leaves the group, its connections close and the waiting server is free too.

        Args:
            suspects: servers that may carry the mark of such an update.
            patience_s: how long the mark of a trainer on another host, of which nothing else is known, must stay the
                same to count as that of a dead one; ``None`` leaves those alone.

        Returns:
            Whether something was ended, here or by the other trainer.

        Raises:
            WeightUpdateError: another trainer is updating a server.
        """
        marks = self._marks(suspects)
        running = {url: mark for url, mark in marks.items() if not self._may_end(mark)}
        changed = False
        if patience_s is not None:
            for url, mark in running.items():
                _log.warning(
                    "%s carries the mark of an update by trainer %s, %s: waiting up to %.0f s for its end. "
                    "SyncConfig(takeover=True) ends it at once",
                    *(url, mark.owner, "which runs" if mark.is_alive() else "not a process of this host", patience_s),
                )
            deadline = time.monotonic() + patience_s
            while running and time.monotonic() < deadline:
                time.sleep(_POLL_S)
                now = self._marks([client for client in suspects if client.url in running])
                for url, mark in list(running.items()):
                    if now.get(url) != mark:
                        changed = True
                        del running[url], marks[url]
                        if url in now and not self._may_end(now[url]):
                            raise self._refusal(url, now[url])
                    elif self._may_end(mark):
                        del running[url]
            alive = {url: mark for url, mark in running.items() if mark.is_alive()}
            for url, mark in alive.items():
                raise self._refusal(url, mark)
            running = {}
        dead = {mark for url, mark in marks.items() if url not in running}
        self._leave_groups({mark.group for mark in dead})
        return changed or bool(dead)

    def _marks(self, clients: Collection[SGLangClient]) -> dict[str, TrainerMark]:
        """The marks of unfinished updates; a server that does not answer has none."""
        outcomes = side_by_side({client.url: client.held_version for client in clients}) if clients else {}
        versions = {url: outcome.value for url, outcome in outcomes.items() if outcome.value is not None}
        return {url: TrainerMark.parse(each.owner) for url, each in versions.items() if each.dirty and each.owner}

    def _may_end(self, mark: TrainerMark) -> bool:
        return self._takeover or mark.owner == self._owner or mark.is_alive() is False

    def _leave_groups(self, groups: Collection[str]) -> None:
        state = self._pool.state
        free = [client for client in self._pool.clients if state.server(client.url).weights != "stuck"]
        for group in groups:
            request = build_destroy_group(group_name(group))
            side_by_side({each.url: partial(each.send, request, timeout_s=_DESTROY_TIMEOUT_S) for each in free})

    def _refusal(self, url: str, mark: TrainerMark) -> WeightUpdateError:
        where = f", process {mark.pid}" if mark.is_alive() else ""
        return WeightUpdateError(
            f"{url} is being updated by another trainer ({mark.owner}{where}), or was left half-updated by it: two "
            "trainers can't share a server. If that one no longer trains, end its process, or take its servers over "
            "with SyncConfig(takeover=True)"
        )
