"""The control endpoints: pause, weights, groups, versions. Each handler turns a :class:`Call` into a :class:`Reply`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from tests.fake_sglang.calls import Call, Reply, bad_request, refusal
from tests.fake_sglang.fused_tensors import fused_checksums
from tests.fake_sglang.locks import RequestLocks
from tests.fake_sglang.model import read_checkpoint
from tests.fake_sglang.payloads import read_payload
from tests.fake_sglang.ranks import Announcement, Ranks
from tests.fake_sglang.scheduler import Scheduler
from tests.fake_sglang.settings import FakeSettings

__all__ = ["Control"]

_FLUSHED = (
    "Cache flushed.\nPlease check backend logs for more details. "
    "(When there are running or waiting requests, the operation will not be performed.)\n"
)
_FLUSH_REFUSED = (
    "Weights were updated, but the cache was not flushed because requests are still running or queued. "
    "Retract or finish them, then call /flush_cache."
)
_RECEIVE_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError)


class Control:
    """Control endpoints of one fake server.

    Args:
        settings: the server's settings.
        locks: the pause guard and the update lock.
        scheduler: runs the calls that change its state, in order.
        ranks: the weights and the process groups.
    """

    def __init__(self, settings: FakeSettings, locks: RequestLocks, scheduler: Scheduler, ranks: Ranks) -> None:
        self._settings = settings
        self._locks = locks
        self._scheduler = scheduler
        self._state = scheduler.state
        self._ranks = ranks
        self.weight_version = settings.weight_version
        self.model_path = str(settings.model_path)

    def _on_scheduler(self, call: Call, command: Callable[[], tuple[bool, str]]) -> tuple[bool, str]:
        """Run on the scheduler's thread, after the commands queued before."""

        def run() -> tuple[bool, str]:
            call.reach("scheduled")
            return command()

        return self._scheduler.call(run)

    @staticmethod
    def _result_reply(result: tuple[bool, str], **more: Any) -> Reply:
        ok, message = result
        return Reply(status=200 if ok else 400, body={"success": ok, "message": message, **more})

    # ------------------------------------------------------------------ pause

    def pause(self, call: Call) -> Reply:
        """``/pause_generation``; ``abort`` holds the pause guard until every request has ended."""
        mode = call.value("mode", str, "abort")
        if mode not in ("abort", "retract", "in_place"):
            call.body = {}
            call.value("mode: Input should be 'abort', 'retract' or 'in_place'", str)
        with self._locks.for_pause():
            self._locks.paused = True
            if mode == "abort":
                self._scheduler.post(lambda: self._scheduler.abort(None))
                while self._locks.is_busy:
                    call.lifecycle.sleep(self._settings.abort_poll_s)
                    self._scheduler.post(lambda: self._scheduler.abort(None))
            else:
                self._scheduler.post(lambda: self._scheduler.pause(mode))
        return Reply(body={"message": "Generation paused successfully.", "status": "ok"})

    def continue_generation(self, call: Call) -> Reply:
        """``/continue_generation``."""
        call.value("torch_empty_cache", bool, True)
        with self._locks.for_pause():
            self._locks.paused = False
            self._scheduler.post(self._scheduler.resume)
            self._locks.notify_resumed()
        return Reply(body={"message": "Generation continued successfully.", "status": "ok"})

    def abort(self, call: Call) -> Reply:
        """``/abort_request``: by id or all; always 200. A request that waits for the end of a pause is not aborted."""
        rid = call.value("rid", str, "")
        if call.value("abort_all", bool, False):
            self._scheduler.post(lambda: self._scheduler.abort(None))
        elif rid:
            self._scheduler.post(lambda: self._scheduler.abort(rid))
        return Reply()

    def flush(self, call: Call) -> Reply:
        """``/flush_cache``; ``?timeout=`` waits for the server to become idle."""
        left = timeout = float(call.query.get("timeout", 0.0))

        def flush() -> tuple[bool, str]:
            call.reach("scheduled")
            return self._scheduler.flush(), ""

        while not self._scheduler.call(flush)[0]:
            if left <= 0:
                why = "Timed out waiting for idle state." if timeout else "Flush cache failed.\n"
                return Reply(status=400, body=why)
            call.lifecycle.sleep(0.05)
            left -= 0.05
        return Reply(body=_FLUSHED)

    # ------------------------------------------------------------------ groups

    def join(self, call: Call) -> Reply:
        """``/init_weights_update_group``; connects to the store before it checks the name."""
        address = call.value("master_address", str)
        port = call.value("master_port", int)
        offset = call.value("rank_offset", int)
        world_size = call.value("world_size", int)
        name = call.value("group_name", str, "weight_update_group")
        backend = call.value("backend", str, "nccl")

        def join() -> tuple[bool, str]:
            if name == "":
                call.lifecycle.die("Group name cannot be empty")
            try:
                if backend != "gloo":
                    raise RuntimeError(f"the fake server speaks gloo, not {backend}")
                stores = self._ranks.reach_store(address, port, world_size)
                ok, message = self._state.may_join(name)
                if not ok:
                    return ok, message
                if not call.has_fault("no_communicator"):
                    self._ranks.join(name, stores, offset, world_size)
            except _RECEIVE_ERRORS as error:
                return False, f"Failed to initialize custom process group: {error}."
            self._state.joined(name)
            return True, message

        return self._result_reply(self._on_scheduler(call, join))

    def leave(self, call: Call) -> Reply:
        """``/destroy_weights_update_group``."""
        name = call.value("group_name", str, "weight_update_group")

        def leave() -> tuple[bool, str]:
            self._ranks.leave(name)
            return self._state.leave(name)

        return self._result_reply(self._on_scheduler(call, leave))

    # ------------------------------------------------------------------ weights

    def begin(self, call: Call) -> Reply:
        """``/begin_weight_update``."""
        call.value("selector", str, "all")
        with self._locks.for_update():
            return self._result_reply(self._on_scheduler(call, self._state.begin))

    def end(self, call: Call) -> Reply:
        """``/end_weight_update``."""
        call.value("selector", str, "all")
        with self._locks.for_update():
            return self._result_reply(self._on_scheduler(call, self._state.end))

    def update(self, call: Call) -> Reply:
        """``/update_weights_from_distributed``."""
        names, dtypes, shapes = (call.value(field, list) for field in ("names", "dtypes", "shapes"))
        group = call.value("group_name", str, "weight_update_group")
        flattened = call.value("load_format", str, "") == "flattened_bucket"
        version = call.value("weight_version", str, None)
        flush = call.value("flush_cache", bool, True)
        if call.value("abort_all_requests", bool, False):
            self._scheduler.post(lambda: self._scheduler.abort(None))

        old = not self._state.has_session

        def update() -> tuple[bool, str]:
            ok, message = self._state.may_update(group)
            if not ok and old:
                call.lifecycle.die(message)
            if not ok:
                return ok, message
            try:
                announced = Announcement(names, dtypes, shapes, flattened=flattened, strict=not old)
                if not self._ranks.is_formed(group):  # by the fault "no_communicator"
                    call.lifecycle.hang()
                received = self._ranks.receive(group, announced, lambda: call.reach("joined"))
            except _RECEIVE_ERRORS as error:
                return False, _partially_updated(error) if old else f"Failed to receive weights: {error}"
            call.reach("received")
            try:
                for weights, named in zip(self._ranks.weights, received, strict=True):
                    weights.load(named)
            except ValueError as error:
                return False, _partially_updated(error)
            return self._loaded(call, version, flush, "Succeeded to update parameter online.")

        with self._locks.for_update():
            ok, message = self._on_scheduler(call, update)
        return self._result_reply((ok, self._versioned(ok, message, version)))

    def update_from_tensors(self, call: Call) -> Reply:
        """``/update_weights_from_tensor``: an error while a rank reads or loads its payload ends SGLang."""
        payloads = call.value("serialized_named_tensors", list)
        version = call.value("weight_version", str, None)
        flush = call.value("flush_cache", bool, True)
        if call.value("load_format", str, None) is not None:
            raise NotImplementedError("the fake server loads tensors one by one")

        def update() -> tuple[bool, str]:
            if self._state.has_session and not self._state.session_open:
                return (
                    False,
                    "update_weights_from_tensor must run between begin_weight_update() and end_weight_update()",
                )
            try:
                received = [read_payload(payloads[rank]) for rank in range(len(self._ranks.weights))]
                call.reach("received")
                for weights, named in zip(self._ranks.weights, received, strict=True):
                    weights.load(named)
            except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, UnpicklingError) as error:
                call.lifecycle.die(f"Scheduler hit an exception: {error}")
            return self._loaded(call, version, flush, "Success")

        with self._locks.for_update():
            ok, message = self._on_scheduler(call, update)
        return self._result_reply((ok, self._versioned(ok, message, version)))

    def _loaded(self, call: Call, version: str | None, flush: bool, message: str) -> tuple[bool, str]:
        """After a load: set the version of new tokens and flush. A refused flush fails the call although it loaded.

        Servers without a session (up to 0.5.20) crash when a flush is refused.
        """
        if version is not None:
            self._state.weight_version = version
        if flush and not self._scheduler.flush():
            if not self._state.has_session:
                call.lifecycle.die("Cache flush failed after updating weights")
            return False, _FLUSH_REFUSED
        return True, message

    def _versioned(self, ok: bool, message: str, version: str | None) -> str:
        if not ok or version is None:
            return message
        self.weight_version = version
        return f"{message} Weight version updated to {version}."

    def update_from_disk(self, call: Call) -> Reply:
        """``/update_weights_from_disk``: needs no session."""
        path = call.value("model_path", str)
        version = call.value("weight_version", str, None)
        flush = call.value("flush_cache", bool, True)

        def update() -> tuple[bool, str]:
            try:
                tensors = read_checkpoint(Path(path))
            except (OSError, RuntimeError) as error:
                return False, f"Failed to get weights iterator: {error}."
            try:
                for weights in self._ranks.weights:
                    weights.load(tensors.items())
            except ValueError as error:
                return False, f"Failed to update weights: {error}.\nRolling back to original weights."
            return self._loaded(call, version, flush, "Succeeded to update model weights.")

        with self._locks.for_update():
            ok, message = self._on_scheduler(call, update)
        if ok:
            self.model_path = path
        return self._result_reply((ok, self._versioned(ok, message, version)), num_paused_requests=0)

    def set_version(self, call: Call) -> Reply:
        """``/update_weight_version``; aborts all running requests unless the body says not to."""
        version = call.value("new_version", str)
        if call.value("abort_all_requests", bool, True):
            self._scheduler.post(lambda: self._scheduler.abort(None))

        def set_version() -> tuple[bool, str]:
            self._state.weight_version = version
            return True, f"Weight version updated to {version}"

        result = self._on_scheduler(call, set_version)
        self.weight_version = version
        return self._result_reply(result, new_version=version)

    def check(self, call: Call) -> Reply:
        """``/weights_checker``: checksums per rank, of the fused tensors."""
        action = call.value("action", str, "checksum") if call.body is not None else "checksum"
        if action != "checksum":
            return refusal(f"Unsupported action={action!r}")
        skip = call.value("skip_tensor_list", list, []) if call.body is not None else []
        ranks = self._scheduler.call(lambda: self._checksums(skip))
        overall = hashlib.sha256("".join(rank["per_gpu_checksum"] for rank in ranks).encode()).hexdigest()
        return Reply(body={"success": True, "message": "Success.", "ranks": ranks, "per_engine_checksum": overall})

    def _checksums(self, skip: list[str]) -> list[dict[str, Any]]:
        out = []
        for rank, weights in enumerate(self._ranks.weights):
            sums = fused_checksums(weights.tensors, rank, len(self._ranks.weights), skip)
            overall = hashlib.sha256("".join(k + sums[k] for k in sorted(sums)).encode()).hexdigest()
            place = {"role": "target", "tp_rank": rank, "tp_size": len(self._ranks.weights), "rank": rank}
            out.append({"checksums": sums, "per_gpu_checksum": overall, "parallelism_info": [place]})
        return out

    def weights_by_name(self, call: Call) -> Reply:
        """``/get_weights_by_name``."""
        name = call.value("name", str)
        size = call.value("truncate_size", int, 100)
        tensor = self._scheduler.call(lambda: self._ranks.weights[0].tensors.get(name))
        if tensor is None:
            raise bad_request("Get parameter by name failed")
        return Reply(body=tensor[:size].to(torch.float32).tolist())


def _partially_updated(error: Exception) -> str:
    return (
        f"Failed to update parameter online: {error}. The full weights of the ModelRunner are partially updated. "
        "Please discard the whole weights."
    )
