"""The LoRA endpoints: load, unload and use adapters. Each adapter changes the replies, whatever its tensors hold."""

from __future__ import annotations

import base64
import binascii
import zlib
from pathlib import Path
from typing import Any

from tests.fake_sglang.calls import Call, Reply, bad_request

__all__ = ["Adapters"]

_FROM_TENSORS = "__tensor__"
_OFF = "LoRA is not enabled. Please set `--enable-lora` to enable LoRA."


class Adapters:
    """The adapters of one fake server.

    Args:
        enabled: whether the server accepts adapters.
    """

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self._loaded: dict[str, str] = {}
        self._ever_loaded: dict[str, tuple[str, int]] = {}

    def signature(self, name: str) -> int:
        """The number that is combined with the weights' signature when the adapter is used."""
        return self._ever_loaded[name][1]

    def require(self, name: str) -> None:
        """Check that a request may use this adapter. One that was loaded from disk is loaded again after an unload.

        Raises:
            BadRequest: the adapter is not loaded.
        """
        if not self.enabled:
            raise bad_request(
                f"LoRA adapter '{name}' was requested, but LoRA is not enabled. Please launch the server with "
                "--enable-lora flag and preload adapters using --lora-paths or /load_lora_adapter endpoint."
            )
        if name in self._loaded:
            return
        if name not in self._ever_loaded:
            raise bad_request(
                f"Got LoRA adapter that has never been loaded: {name}\nAll loaded adapters: {self._loaded.keys()}."
            )
        path = self._ever_loaded[name][0]
        if path == _FROM_TENSORS:
            raise bad_request(f"Failed to implicitly load LoRA adapter {name}: {path} is no folder")
        self._loaded[name] = path

    def load(self, call: Call) -> Reply:
        """``/load_lora_adapter``."""
        name, path = call.value("lora_name", str), call.value("lora_path", str)
        if not self.enabled:
            return self._reply(_OFF)
        file = Path(path) / "adapter_model.safetensors"
        if not file.exists():
            return self._reply(f"{path} holds no adapter")
        return self._register(name, path, zlib.crc32(file.read_bytes()))

    def load_from_tensors(self, call: Call) -> Reply:
        """``/load_lora_adapter_from_tensors``: one base64 pickle per rank. A pickle that cannot be read ends SGLang."""
        name = call.value("lora_name", str)
        call.value("config_dict", dict)
        payloads = call.value("serialized_named_tensors", list)
        if not self.enabled:
            return self._reply(_OFF)
        try:
            content = base64.b64decode(payloads[0], validate=True)
        except (IndexError, binascii.Error) as error:
            return self._reply(str(error))
        if not content.startswith(b"\x80"):
            call.lifecycle.die("the adapter's tensors can't be unpickled")
        return self._register(name, _FROM_TENSORS, zlib.crc32(content))

    def _register(self, name: str, path: str, content: int) -> Reply:
        if name in self._loaded:
            return self._reply(f"Failed to load LoRA adapter {name} because it is already loaded")
        self._loaded[name] = path
        self._ever_loaded[name] = (path, content)
        return self._reply("")

    def unload(self, call: Call) -> Reply:
        """``/unload_lora_adapter``."""
        name = call.value("lora_name", str)
        if not self.enabled:
            return self._reply(_OFF)
        if name not in self._loaded:
            reply = self._reply(f"LoRA with name {name} does not exist. Loaded LoRAs: {self._loaded.keys()}")
            reply.body["loaded_adapters"] = None
            return reply
        del self._loaded[name]
        return self._reply("")

    def _reply(self, error: str) -> Reply:
        body: dict[str, Any] = {"rid": None, "http_worker_ipc": None, "success": not error, "error_message": error}
        body["loaded_adapters"] = dict(self._loaded) if self.enabled else None
        return Reply(status=400 if error else 200, body=body)
