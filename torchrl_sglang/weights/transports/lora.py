"""The transport for adapters: only the LoRA tensors go over, under a name per version; requests switch to it.

Nothing is paused: a request under way keeps the adapter it began with, new ones use the new adapter, and the old one is
unloaded when the one after it has arrived. The base model must be the one the servers were started with.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SyncConfig
from torchrl_sglang.errors import ConfigError, SGLangError, WeightUpdateError
from torchrl_sglang.parallel import side_by_side
from torchrl_sglang.pool import Adapter, SGLangPool
from torchrl_sglang.protocol.control import build_load_lora_from_tensors, build_unload_lora, check_success
from torchrl_sglang.protocol.version import WeightVersion
from torchrl_sglang.weights.checkpoint.values import check_finite
from torchrl_sglang.weights.source.shards import is_sharded
from torchrl_sglang.weights.transports.lora_payload import encode_config, encode_tensors
from torchrl_sglang.weights.update.report import SyncReport
from torchrl_sglang.weights.update.verification import prove

__all__ = ["LoraTransport"]

_log = logging.getLogger(__name__)

_KEPT_VERSIONS = 2
"""Requests under way may still use the adapter before."""


class LoraTransport:
    """Sends a PEFT model's active adapter to servers launched with ``--enable-lora``.

    Args:
        pool: the servers; its ``adapter`` is what requests use.
        owner: goes into adapters' names, so that two trainers don't meet in one.
    """

    name = "lora"

    def __init__(self, pool: SGLangPool, owner: str) -> None:
        self._pool = pool
        self._owner = owner
        self._loaded: list[str] = []

    def send(
        self, clients: Sequence[SGLangClient], weights: Any, version: WeightVersion, timeout_s: float
    ) -> tuple[int, int]:
        """Load the adapter on every server and switch requests to it.

        Args:
            clients: the servers.
            weights: a module that holds a PEFT model.
            version: what the adapter will be called.
            timeout_s: seconds one server may take.

        Returns:
            Bytes and number of the tensors sent.

        Raises:
            ConfigError: no PEFT model, a sharded one, or a server without LoRA.
            WeightCoverageError: NaN or infinity in the adapter.
            WeightUpdateError: a server refused the adapter; all go on with the one before.
        """
        model, adapter = find_adapter(weights)
        for client in clients:
            if not client.info.lora_enabled:
                raise ConfigError(
                    f"{client.url} was started without LoRA: launch it with extra_args=('--enable-lora', "
                    "'--max-lora-rank', '...', '--lora-target-modules', ...)"
                )
        tensors = adapter_tensors(model, adapter)
        for tensor_name, tensor in tensors.items():
            check_finite(tensor_name, tensor)
        payload, config = encode_tensors(tensors), encode_config(model.peft_config[adapter])
        name = f"torchrl-{self._owner}-{version.number}"
        self._pool.highest_version = max(self._pool.highest_version, version.number)  # taken, whatever becomes of it

        def loading(client: SGLangClient) -> Any:
            request = build_load_lora_from_tensors(name, config, [payload] * client.info.tp_size)
            return lambda: check_success(
                client.send(request, timeout_s=timeout_s), server=client.url, what="the adapter"
            )

        outcomes = side_by_side({client.url: loading(client) for client in clients})
        failed = {url: outcome.error for url, outcome in outcomes.items() if outcome.error is not None}
        if failed:
            self._unload(clients, name)
            url, error = next(iter(failed.items()))
            raise WeightUpdateError(
                f"{url} did not take the adapter: {error}.\nAll servers go on with the one before",
                server_weights={client.url: "old" for client in clients},
            ) from error
        self._pool.adapter = Adapter(name=name, version=str(version))
        self._loaded.append(name)
        while len(self._loaded) > _KEPT_VERSIONS:
            self._unload(clients, self._loaded.pop(0))
        return sum(tensor.nbytes for tensor in tensors.values()), len(tensors)

    def push(
        self, clients: Sequence[SGLangClient], weights: Any, version: WeightVersion, config: SyncConfig, start: float
    ) -> SyncReport:
        """Send the adapter, prove it, report.

        Args:
            clients: the servers.
            weights: a module that holds a PEFT model.
            version: what the adapter will be called.
            config: time-outs and proof.
            start: ``time.monotonic()`` value when the update began.

        Raises:
            The errors of :meth:`send`, and :class:`WeightUpdateError` if a server answers otherwise than the model
            with its adapter; requests then stay with the adapter before.
        """
        before = self._pool.adapter
        num_bytes, num_tensors = self.send(clients, weights, version, config.deadline_s(0))
        transfer_s = time.monotonic() - start
        gap = None
        if config.verify != "off" and self._pool.vocab_size is not None and self._pool.adapter is not None:
            model, _ = find_adapter(weights)
            dtypes = {parameter.dtype for parameter in model.parameters()}
            exact = dtypes == {torch.float32} and self._pool.info.dtype == "float32"
            try:
                gap = prove(
                    clients,
                    vocab_size=self._pool.vocab_size,
                    model=model,
                    config=config,
                    exact=exact,
                    lora=self._pool.adapter.name,
                )
            except WeightUpdateError:
                self._unload(clients, self._loaded.pop())
                self._pool.adapter = before
                raise
        return SyncReport(
            version=version.number,
            transport=self.name,
            num_bytes=num_bytes,
            num_tensors=num_tensors,
            num_buckets=1,
            pause="none",
            seconds={"transfer": transfer_s, "prove": time.monotonic() - start - transfer_s},
            total_s=time.monotonic() - start,
            max_logprob_gap=gap,
            server_weights={client.url: "new" for client in clients},
        )

    def _unload(self, clients: Sequence[SGLangClient], name: str) -> None:
        """Forget an adapter where it is loaded; a server that never had it says so, and that is fine."""

        def unload(client: SGLangClient) -> Any:
            def call() -> None:
                try:
                    client.send(build_unload_lora(name))
                except SGLangError as error:
                    _log.debug("%s could not forget adapter %s: %s", client.url, name, error)

            return call

        side_by_side({client.url: unload(client) for client in clients})


def find_adapter(weights: Any) -> tuple[Any, str]:
    """The PEFT model inside ``weights`` and the name of its one active adapter.

    Raises:
        ConfigError: there is none, it is sharded, or several adapters are active.
    """
    modules = weights.modules() if isinstance(weights, nn.Module) else ()
    model = next((each for each in modules if hasattr(each, "peft_config") and hasattr(each, "active_adapters")), None)
    if model is None:
        raise ConfigError(
            f"transport='lora' sends the adapter of a PEFT model, and there is none in this {type(weights).__name__}; "
            "transport='broadcast' sends whole models"
        )
    if is_sharded(model):
        raise ConfigError(
            "transport='lora' can't send the adapter of a sharded model (FSDP2): transport='broadcast' gathers it and "
            "merges it into what is sent"
        )
    peft_model: Any = model
    names = peft_model.active_adapters
    active = list(names() if callable(names) else names)
    if len(active) != 1:
        raise ConfigError(f"one adapter can be sent, but {active} are active: model.set_adapter(name)")
    return model, active[0]


def adapter_tensors(model: Any, adapter: str) -> dict[str, torch.Tensor]:
    """The adapter's tensors under the names of ``adapter_model.safetensors``."""
    from peft import get_peft_model_state_dict  # an extra

    state: dict[str, torch.Tensor] = get_peft_model_state_dict(model, adapter_name=adapter)
    return {name: tensor.detach() for name, tensor in state.items()}
