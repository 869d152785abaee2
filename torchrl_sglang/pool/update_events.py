"""What a weight update does to the records of a pool. A method is named after the event that it records."""

from __future__ import annotations

from dataclasses import replace

from torchrl_sglang.errors import ServerWeights
from torchrl_sglang.pool.record_store import RecordStore, weights_under
from torchrl_sglang.pool.records import Adapter, Phase, SavedWeights, ServerState
from torchrl_sglang.protocol.version import WeightVersion

__all__ = ["UpdateEvents"]


class UpdateEvents(RecordStore):
    """The events of weight updates, on servers and on the weights that they share."""

    def update_started(self, url: str) -> None:
        """A weight update is about to reach a server."""
        with self._lock:
            known = self.server(url)
            # An update of ours ends the polling of such a server: only its verification may put the server back.
            changed: dict[Phase, Phase] = {"serving": "updating", "dirty": "quarantined", "joining": "quarantined"}
            phase = changed.get(known.phase, known.phase)
            weights: ServerWeights = "mixed" if known.weights in ("mixed", "stuck") else "old"
            self._change(url, phase=phase, weights=weights, session_open=False, version_before="")

    def update_version_read(self, url: str, version: str) -> None:
        """A server holds ``version`` and is about to be marked dirty."""
        # A mark that is there already is that of an update that never finished: there are no old weights to return to.
        self._record(url, weights=weights_under(version), version_before=version)

    def update_abandoned(self, url: str) -> None:
        """An update failed before it changed anything on a server, which continues as before."""
        with self._lock:
            self._change(url, phase=self._phase_after_update(url), version_before="")

    def session_opened(self, url: str) -> None:
        """A server has opened an update session for us."""
        self._record(url, session_open=True)

    def session_closed(self, url: str) -> None:
        """A server has closed our update session."""
        self._record(url, session_open=False)

    def weights_changed(self, url: str, weights: ServerWeights) -> None:
        """From now on a server holds ``weights``, as far as this update knows."""
        complete_from = {} if weights == "old" else {"complete_from": ""}
        self._record(url, weights=weights, **complete_from)

    def incomplete_found(self, url: str) -> None:
        """A server was seen to hold tensors that this trainer did not send."""
        self._record(url, complete_from="")

    def saved_weights_loaded(self, url: str, version: str) -> None:
        """A server has loaded ``version`` from a shared folder."""
        self._record(url, version=version, complete_from="")

    def version_claimed(self, number: int) -> None:
        """A server has been told version ``number``: from now on it names these weights and no others."""
        with self._lock:
            highest = max(self._weights.highest_version, number)
            self._weights = replace(self._weights, highest_version=highest)

    def update_finished(self, url: str, version: str, *, complete_from: str) -> ServerState:
        """A server has taken over a whole update and generates again.

        Args:
            url: the server.
            version: version string it reports.
            complete_from: owner id of the trainer that sent the update.
        """
        with self._lock:
            phase = self._phase_after_update(url)
            rejected = self.server(url).rejected_version
            return self._change(
                url,
                rejected_version="" if rejected == version else rejected,
                phase=phase,
                version=version,
                weights="new",
                complete_from=complete_from,
                version_before="",
                is_verified=False,
                newest_seen=0,
            )

    def update_rejected(self, url: str, version: str) -> None:
        """A server has failed the verification of the update to ``version``."""
        self._record(url, rejected_version=version)

    def verification_ended(self, url: str) -> None:
        """The verification of a server's last update is over, or was broken off."""
        with self._lock:
            self._put(replace(self.server(url), is_verified=True))

    def adapter_loaded(self, url: str) -> None:
        """A server has loaded the trainer's adapter; its own weights stay as they are."""
        with self._lock:
            self._change(url, phase=self._phase_after_update(url), weights="new")

    def weights_served(self, version: WeightVersion) -> None:
        """Routed servers serve a version that this process has sent."""
        with self._lock:
            self._weights = replace(self._weights.having_seen(version), version=version.number)

    def caches_salted(self, cache_salt: str | None) -> None:
        """New requests use another name space of the prefix caches; ``None`` when the caches were flushed."""
        with self._lock:
            self._weights = replace(self._weights, cache_salt=cache_salt)

    def adapter_switched(self, adapter: Adapter | None) -> None:
        """Requests that name no adapter are answered with this one; ``None`` is the base model."""
        with self._lock:
            self._weights = replace(self._weights, adapter=adapter)

    def weights_saved(self, saved: SavedWeights | None) -> None:
        """The current weights lie in a shared folder; ``None`` when they no longer do as a whole."""
        with self._lock:
            self._weights = replace(self._weights, saved=saved)
