"""The endpoints that report model, settings, load and health."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from typing import Any

from tests.fake_sglang.calls import Call, Reply
from tests.fake_sglang.control import Control
from tests.fake_sglang.locks import RequestLocks
from tests.fake_sglang.scheduler import Scheduler
from tests.fake_sglang.sequences import Sampling, Sequence
from tests.fake_sglang.settings import FakeSettings
from tests.fake_sglang.vocabulary import Vocabulary

__all__ = ["InfoEndpoints"]


class InfoEndpoints:
    """Endpoints that only read.

    Args:
        settings: the server's settings.
        config: the checkpoint's ``config.json``.
        vocabulary: the model's tokens.
        locks: whether the server is paused.
        scheduler: running and waiting requests.
        control: weight version and model path.
    """

    def __init__(
        self,
        settings: FakeSettings,
        config: Mapping[str, Any],
        vocabulary: Vocabulary,
        locks: RequestLocks,
        scheduler: Scheduler,
        control: Control,
    ) -> None:
        self._settings = settings
        self._random_seed = random.SystemRandom().randrange(2**30)  # drawn at the start, as SGLang does
        self._config = config
        self._vocabulary = vocabulary
        self._locks = locks
        self._scheduler = scheduler
        self._control = control
        self._healthy = True

    def ready(self, call: Call) -> Reply:
        """``/ready``: does not use the scheduler, so it also answers while that is blocked."""
        return Reply(status=200 if self._healthy and not self._locks.paused else 503)

    def health(self, call: Call) -> Reply:
        """``/health`` and ``/health_generate``."""
        if call.path == "/health" and not self._settings.health_generates:
            return Reply()
        probe = Sequence(prompt=[0], sampling=Sampling(max_new_tokens=1, temperature=0.0))
        before = self._scheduler.steps
        deadline = time.monotonic() + self._settings.health_timeout_s
        if not self._locks.paused:
            self._scheduler.post(lambda: self._scheduler.add([probe]))
        while time.monotonic() < deadline:
            call.lifecycle.sleep(0.05)
            if self._scheduler.steps > before:
                self._healthy = True
                return Reply()
        self._healthy = False
        return Reply(status=503)

    def model_info(self, call: Call) -> Reply:
        """``/model_info``: reports the current weight version."""
        body = {
            "model_path": self._control.model_path,
            "served_model_name": self._control.model_path,
            "tokenizer_path": str(self._settings.model_path),
            "is_generation": True,
            "preferred_sampling_params": None,
            "weight_version": self._control.weight_version,
            "load_format": "auto",
            "reasoning_parser": None,
            "tool_call_parser": None,
            "disaggregation_mode": "null",
            "has_image_understanding": False,
            "has_audio_understanding": False,
            "model_type": self._config.get("model_type"),
            "architectures": self._config.get("architectures"),
        }
        return Reply(body=body)

    def server_info(self, call: Call) -> Reply:
        """``/server_info``: the settings given at the start; waits for the scheduler, as SGLang's does."""
        self._scheduler.call(lambda: call.reach("scheduled"))
        settings = self._settings
        body = {
            "model_path": str(settings.model_path),
            "tokenizer_path": str(settings.model_path),
            "served_model_name": str(settings.model_path),
            "host": settings.host,
            "port": settings.port,
            "dtype": self._config.get("dtype") or self._config.get("torch_dtype") or "float32",
            "tp_size": settings.tp_size,
            "dp_size": 1,
            "pp_size": 1,
            "nnodes": 1,
            "random_seed": self._random_seed,
            "device": "cpu",
            "base_gpu_id": 0,
            "quantization": None,
            "context_length": None,
            "is_embedding": False,
            "skip_tokenizer_init": False,
            "load_format": "auto",
            "page_size": 1,
            "enable_lora": settings.enable_lora or None,
            "weight_version": settings.weight_version,
            "preferred_sampling_params": settings.preferred_sampling_params,
            "incremental_streaming_output": settings.incremental_streaming_output,
            "stream_interval": settings.stream_interval,
            "max_total_tokens": settings.max_total_tokens,
            "max_total_num_tokens": settings.max_total_tokens,
            "max_req_input_len": min(self._vocabulary.context_length, settings.max_total_tokens) - 6,
            "status": "ready",
            "internal_states": [{"last_gen_throughput": 0.0, "api_key": settings.api_key}],
            "version": settings.version,
            "api_key": settings.api_key,
            "admin_api_key": settings.admin_api_key,
            "fake": True,
        }
        return Reply(body=body)

    def models(self, call: Call) -> Reply:
        """``/v1/models``."""
        path = self._control.model_path
        model = {"id": path, "object": "model", "created": int(time.time()), "owned_by": "sglang", "root": path}
        model |= {"parent": None, "max_model_len": self._vocabulary.context_length}
        return Reply(body={"object": "list", "data": [model]})

    def loads(self, call: Call) -> Reply:
        """``/v1/loads``: does not wait for the scheduler, so it also answers while that is blocked."""
        load = {
            "dp_rank": 0,
            "num_running_reqs": len(self._scheduler.running),
            "num_waiting_reqs": len(self._scheduler.waiting),
            "max_total_num_tokens": self._settings.max_total_tokens,
        }
        return Reply(body={"version": self._settings.version, "loads": [load]})

    def old_load(self, call: Call) -> Reply:
        """``/get_load`` of SGLang before 0.5.21."""
        running, waiting = len(self._scheduler.running), len(self._scheduler.waiting)
        return Reply(body=[{"dp_rank": 0, "num_reqs": running + waiting, "num_waiting_reqs": waiting, "num_tokens": 0}])
