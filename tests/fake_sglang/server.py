"""The fake server in this process, assembled from its parts."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from tests.fake_sglang.adapters import Adapters
from tests.fake_sglang.calls import BadRequest, Call, Lifecycle, Reply
from tests.fake_sglang.control import Control
from tests.fake_sglang.faults import Fault, FaultRegistry
from tests.fake_sglang.generate import Generator
from tests.fake_sglang.http_frontend import HttpFrontend
from tests.fake_sglang.info_endpoints import InfoEndpoints
from tests.fake_sglang.locks import RequestLocks
from tests.fake_sglang.model import Weights, read_checkpoint
from tests.fake_sglang.ranks import Ranks
from tests.fake_sglang.scheduler import Scheduler, ServerStopped
from tests.fake_sglang.settings import FakeSettings
from tests.fake_sglang.state import ControlState
from tests.fake_sglang.vocabulary import Vocabulary

__all__ = ["FakeServer"]

_Handler = Callable[[Call], Reply]


class FakeServer:
    """A server with SGLang's HTTP contract that receives weights over real gloo groups, with faults on demand.

    Args:
        settings: see :class:`FakeSettings`.
        exit_on_death: whether a fault that ends the server ends this process, as in :class:`FakeServerProcess`. If not,
            the server closes all its connections and accepts no more.

    Raises:
        FileNotFoundError: the model folder has no ``config.json`` or no safetensors.

    Examples:
        >>> import tempfile, json, torch, pathlib, urllib.request
        >>> from safetensors.torch import save_file
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "config.json").write_text(json.dumps({"vocab_size": 8, "model_type": "llama"}))
        >>> save_file({"lm_head.weight": torch.ones(8, 4)}, folder / "model.safetensors")
        >>> with FakeServer(FakeSettings(model_path=folder)) as server:
        ...     reply = json.load(urllib.request.urlopen(server.url + "/model_info"))
        >>> reply["weight_version"]
        'default'
    """

    def __init__(self, settings: FakeSettings, *, exit_on_death: bool = False) -> None:
        self.settings = settings
        folder = Path(settings.model_path)
        config = json.loads((folder / "config.json").read_text())
        dtype_name = config.get("dtype") or config.get("torch_dtype")
        dtype = getattr(torch, dtype_name) if dtype_name else None
        first = Weights(read_checkpoint(folder), dtype)
        self._ranks = Ranks(
            [first, *(Weights(first.tensors) for _ in range(settings.tp_size - 1))], settings.collective_timeout_s
        )
        self._adapters = Adapters(enabled=settings.enable_lora)
        self._lifecycle = Lifecycle(None if exit_on_death else self._close_connections)
        self._locks = RequestLocks(self._lifecycle.stopped)
        vocabulary = Vocabulary.read(folder, config)
        self._scheduler = Scheduler(
            settings,
            ControlState(has_session=settings.has_session, weight_version=settings.weight_version),
            signature_of=self._signature_of,
            vocab_size=vocabulary.size,
            eos_ids=vocabulary.eos_ids,
            decode_text=vocabulary.decode,
            stopped=self._lifecycle.stopped,
            frozen=self._lifecycle.frozen,
        )
        self._control = Control(settings, self._locks, self._scheduler, self._ranks)
        self._info = InfoEndpoints(settings, config, vocabulary, self._locks, self._scheduler, self._control)
        self._generate = Generator(settings, vocabulary, self._locks, self._scheduler, self._adapters)
        self._faults = FaultRegistry(settings.faults)
        self._events: list[dict[str, Any]] = []
        self._events_lock = threading.Lock()
        self._frontend = HttpFrontend(settings, self._lifecycle, self._answer)
        self._routes = self._make_routes()

    def _signature_of(self, adapter: str | None) -> int:
        """Signature of the weights that are used with an adapter, or of the base model."""
        base = self._ranks.weights[0].signature
        return base if adapter is None else base ^ self._adapters.signature(adapter)

    # ------------------------------------------------------------------ start and stop

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://{self.settings.host}:{self._frontend.port}"

    def start(self) -> FakeServer:
        """Accept and answer requests in threads of this process."""
        self.settings = replace(self.settings, port=self._frontend.port)
        self._scheduler.start()
        self._frontend.start()
        return self

    def stop(self) -> None:
        """Close all connections and stop answering. A rank that waits in a collective keeps waiting."""
        self._lifecycle.stopped.set()
        self._close_connections()

    def _close_connections(self) -> None:
        self._frontend.close()
        self._ranks.leave_all()

    def __enter__(self) -> FakeServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # ------------------------------------------------------------------ what tests read and set

    @property
    def events(self) -> list[dict[str, Any]]:
        """Every request in the order of arrival: ``seq, method, path, body, status`` (``None`` while unanswered)."""
        with self._events_lock:
            return [dict(event) for event in self._events]

    @property
    def weights(self) -> list[dict[str, torch.Tensor]]:
        """Per rank, the tensors it holds now by name."""
        return [dict(weights.tensors) for weights in self._ranks.weights]

    def arm(self, *faults: Fault) -> None:
        """Arm faults; each counts requests from now on."""
        self._faults.arm(*faults)

    def disarm(self) -> None:
        """Disarm all faults."""
        self._faults.clear()

    def set_state(self, *, session_open: bool | None = None, weight_version: str | None = None) -> None:
        """Set state as another trainer might have left it."""
        if session_open is not None:
            self._scheduler.state.session_open = session_open
        if weight_version is not None:
            self._scheduler.state.weight_version = self._control.weight_version = weight_version

    # ------------------------------------------------------------------ answering

    def _make_routes(self) -> dict[str, tuple[str, _Handler, bool]]:
        """Per path: HTTP methods, handler, and whether it needs the admin key."""
        control, info = self._control, self._info
        routes: dict[str, tuple[str, _Handler, bool]] = {
            "/ready": ("GET", info.ready, False),
            "/health": ("GET", info.health, False),
            "/health_generate": ("GET", info.health, False),
            "/model_info": ("GET", info.model_info, False),
            "/get_model_info": ("GET", info.model_info, False),
            "/server_info": ("GET", info.server_info, False),
            "/get_server_info": ("GET", info.server_info, False),
            "/v1/models": ("GET", info.models, False),
            "/v1/loads": ("GET", info.loads, False),
            "/generate": ("POST PUT", self._generate, False),
            "/flush_cache": ("GET POST", control.flush, True),
            "/pause_generation": ("POST", control.pause, True),
            "/continue_generation": ("POST", control.continue_generation, True),
            "/abort_request": ("POST", control.abort, True),
            "/init_weights_update_group": ("POST", control.join, True),
            "/destroy_weights_update_group": ("POST", control.leave, True),
            "/update_weights_from_distributed": ("POST", control.update, True),
            "/update_weights_from_tensor": ("POST", control.update_from_tensors, True),
            "/update_weights_from_disk": ("POST", control.update_from_disk, True),
            "/update_weight_version": ("POST", control.set_version, True),
            "/weights_checker": ("GET POST", control.check, True),
            "/get_weights_by_name": ("GET POST", control.weights_by_name, True),
            "/load_lora_adapter": ("POST", self._adapters.load, True),
            "/load_lora_adapter_from_tensors": ("POST", self._adapters.load_from_tensors, True),
            "/unload_lora_adapter": ("POST", self._adapters.unload, True),
        }
        if self.settings.has_session:
            routes["/begin_weight_update"] = ("POST", control.begin, True)
            routes["/end_weight_update"] = ("POST", control.end, True)
        else:
            routes["/get_load"] = ("GET", info.old_load, False)
        return routes

    def _answer(self, call: Call, authorization: str | None) -> Reply:
        """Record one request, apply its faults, check its key and answer it.

        Raises:
            ServerStopped: the server has ended. Its connections are closed one by one, and one may still be open.
        """
        if self._lifecycle.stopped.is_set():
            raise ServerStopped
        if call.path.startswith("/fake/"):
            return self._admin(call)
        event = {"method": call.method, "path": call.path, "body": call.body, "status": None, "at": time.monotonic()}
        with self._events_lock:
            event["seq"] = len(self._events)
            self._events.append(event)
        call.faults = self._faults.match(call.path)
        try:
            call.reach("arrived")
            reply = self._route(call, authorization)
            call.reach("handled")
        except BadRequest as bad:
            reply = bad.reply
        event["status"] = reply.status
        return replace(reply, half=call.has_fault("half_reply"), then_close=call.has_fault("close"))

    def _route(self, call: Call, authorization: str | None) -> Reply:
        methods, handler, is_control = self._routes.get(call.path, ("", None, False))
        if not self._allowed(call.path, is_control, authorization):
            return Reply(status=401, body={"error": "Unauthorized"})
        if handler is None:
            return Reply(status=404, body={"detail": "Not Found"})
        if call.method not in methods.split():
            return Reply(status=405, body={"detail": "Method Not Allowed"})
        return handler(call)

    def _allowed(self, path: str, is_control: bool, authorization: str | None) -> bool:
        """SGLang's rule: health checks need none; control calls need the admin key if one is set, else the API key."""
        if path.startswith(("/health", "/ready")):
            return True
        wanted = self.settings.api_key
        if is_control and self.settings.admin_api_key:
            wanted = self.settings.admin_api_key
        return not wanted or authorization == f"Bearer {wanted}"

    def _admin(self, call: Call) -> Reply:
        """``/fake/faults`` (GET, POST, DELETE), ``/fake/events`` (GET, DELETE), ``/fake/state`` (POST)."""
        if call.path == "/fake/events":
            if call.method == "DELETE":
                with self._events_lock:
                    self._events.clear()
            return Reply(body=self.events)
        if call.path == "/fake/faults":
            if call.method == "DELETE":
                self.disarm()
            elif call.method == "POST":
                records = call.body if isinstance(call.body, list) else [call.body]
                try:
                    self.arm(*(Fault.from_json(record) for record in records))
                except (TypeError, ValueError) as error:
                    return Reply(status=400, body={"error": str(error)})
            return Reply(body=[fault.to_json() for fault in self._faults.armed()])
        if call.path == "/fake/state" and call.method == "POST":
            self.set_state(**call.body)
            return Reply(body={})
        return Reply(status=404, body={"detail": "Not Found"})
