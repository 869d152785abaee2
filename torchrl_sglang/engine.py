"""``AsyncSGLang``: servers and pool behind the one class people know from TorchRL."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import ClientConfig, SamplingParams, ServerConfig, SyncConfig, nearest_name
from torchrl_sglang.errors import ConfigError, SGLangError
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.control import build_flush
from torchrl_sglang.protocol.messages import GenerateReply
from torchrl_sglang.server import SGLangServer, replicate, start_fleet, stop_fleet
from torchrl_sglang.weights.checkpoint import Checkpoint
from torchrl_sglang.weights.group import reachable_address
from torchrl_sglang.weights.report import SyncReport
from torchrl_sglang.weights.sync import WeightSync

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["AsyncSGLang"]

# The names vLLM users type, and what SGLang calls the same thing.
_SERVER_ALIASES = {
    "max_model_len": "context_length",
    "tensor_parallel_size": "tp_size",
    "num_gpus": "tp_size",
    "gpu_memory_utilization": "mem_fraction_static",
    "num_replicas": "dp_size",
    "data_parallel_size": "dp_size",
}


class AsyncSGLang:
    """One or more SGLang servers of one model: launched here, or running elsewhere.

    Use :meth:`from_pretrained` to launch servers and :meth:`connect` to attach to running ones. A launched engine
    owns its processes and ends them on :meth:`shutdown`, at the end of a ``with`` block and at exit; a pickled copy
    attaches to the same servers and owns nothing.

    Attributes:
        pool: the servers as one (:class:`~torchrl_sglang.SGLangPool`).
        servers: the processes this engine launched; empty when attached.
    """

    def __init__(self, pool: SGLangPool, servers: Sequence[SGLangServer] = ()) -> None:
        self.pool = pool
        self.servers = tuple(servers)
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._sync_config = SyncConfig()
        self._sync: WeightSync | None = None

    # ------------------------------------------------------------------ making one

    @classmethod
    def connect(cls, url: str | Sequence[str], **client: Any) -> AsyncSGLang:
        """Attach to running servers.

        Args:
            url: base URL, or one per server.
            **client: fields of :class:`~torchrl_sglang.ClientConfig`: ``api_key``, ``admin_api_key``, time-outs...

        Raises:
            ConfigError: a bad URL, an unknown argument, or servers of different models.
            ServerUnreachableError: nothing listens there.
            ProtocolError: something that is not an SGLang server listens there.
        """
        _refuse_unknown(client, [f.name for f in fields(ClientConfig)])
        config = ClientConfig(**client)
        urls = [url] if isinstance(url, str) else list(url)
        pool = SGLangPool([SGLangClient(each, config) for each in urls])
        pool.connect()
        return cls(pool)

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        tp_size: int = 1,
        dp_size: int = 1,
        gpus: Sequence[Sequence[int]] | None = None,
        progress: Callable[[str], None] | None = None,
        client: ClientConfig | None = None,
        **server: Any,
    ) -> AsyncSGLang:
        """Launch servers and wait until they are ready.

        Args:
            model: path or hub name of the checkpoint.
            tp_size: tensor-parallel ranks per server.
            dp_size: number of servers. Several servers are the only form of data parallelism that can take weight
                updates, so SGLang's own ``--dp-size`` is not used.
            gpus: GPUs of each server, e.g. ``[[0, 1], [2, 3]]``; by default server ``i`` takes the next ``tp_size``.
            progress: called with a line of text while the servers load.
            client: how to talk to the servers; their keys are filled in.
            **server: fields of :class:`~torchrl_sglang.ServerConfig` (vLLM's ``max_model_len``,
                ``gpu_memory_utilization``, ... are translated); SGLang's other flags go into ``extra_args``.

        Raises:
            ConfigError: an unknown or impossible argument, before anything is launched.
            ServerStartError: a server did not become ready; all are ended, the log's tail is in the error.
        """
        for name, ours in _SERVER_ALIASES.items():
            if name in server and ours in ("tp_size", "dp_size"):
                value = server.pop(name)
                tp_size, dp_size = (value, dp_size) if ours == "tp_size" else (tp_size, value)
            elif name in server:
                server[ours] = server.pop(name)
        known = [f.name for f in fields(ServerConfig) if f.name not in ("model", "tp_size", "gpus")]
        _refuse_unknown(server, [*known, *_SERVER_ALIASES])
        if dp_size < 1:
            raise ConfigError(f"dp_size is the number of servers and must be at least 1, got {dp_size}")
        configs = replicate(ServerConfig(model=model, tp_size=tp_size, **server), dp_size, gpus)
        servers = start_fleet(configs, progress=progress)
        keys = {"api_key": configs[0].api_key, "admin_api_key": configs[0].admin_api_key}
        base = {f.name: getattr(client, f.name) for f in fields(ClientConfig)} if client is not None else {}
        config = ClientConfig(**{**base, **{name: key for name, key in keys.items() if key is not None}})
        engine = cls(SGLangPool([SGLangClient(each.url, config) for each in servers]), servers)
        try:
            engine.pool.connect()
        except SGLangError:
            engine.shutdown()
            raise
        return engine

    # ------------------------------------------------------------------ what it is

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The served model's tokenizer, loaded on first use.

        Raises:
            ConfigError: the server's tokenizer path can't be read from this machine.
        """
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.pool)
        return self._tokenizer

    @property
    def weight_version(self) -> int:
        """Version number of the weights that the last finished sync put on the servers."""
        return self.pool.weight_version

    def get_tp_size(self) -> int:
        """Tensor-parallel ranks of one server."""
        return self.pool.info.tp_size

    def get_dp_size(self) -> int:
        """Number of servers."""
        return len(self.pool.clients)

    # ------------------------------------------------------------------ generating

    def generate(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        sampling_params: SamplingParams | dict[str, Any] | None = None,
        return_logprobs: bool = True,
        return_text: bool = True,
        timeout_s: float | None = None,
        **sampling: Any,
    ) -> GenerateReply | list[GenerateReply]:
        """Generate from text or token ids, one or many.

        Args:
            prompts: text; encoded with the served tokenizer.
            input_ids: token ids instead of text.
            sampling_params: how tokens are drawn.
            return_logprobs: report the log-prob of every response token.
            return_text: keep the server's decoded text in the replies.
            timeout_s: seconds for the whole batch.
            **sampling: single sampling arguments instead of ``sampling_params``, under any of the names that
                :meth:`SamplingParams.from_kwargs` knows.

        Returns:
            One reply for a single prompt with ``n=1``, else a prompt-major list of ``B * n``.

        Raises:
            ConfigError: bad prompts or sampling arguments; nothing was sent.
            ServerError: see :meth:`SGLangPool.generate`.
        """
        if (prompts is None) == (input_ids is None):
            raise ConfigError("give either prompts (text) or input_ids (token ids)")
        if prompts is not None:
            texts = [prompts] if isinstance(prompts, str) else list(prompts)
            ids_B_T = [self.tokenizer.encode(text) for text in texts]
            single = isinstance(prompts, str)
        else:
            assert input_ids is not None
            single = len(input_ids) > 0 and isinstance(input_ids[0], int)
            ids_B_T = [list(input_ids)] if single else [list(ids_T) for ids_T in input_ids]  # type: ignore[arg-type]
        params = _sampling(sampling_params, sampling)
        replies = self.pool.generate(ids_B_T, params, return_logprobs=return_logprobs, timeout_s=timeout_s)
        if not return_text:
            replies = [replace(reply, text="") for reply in replies]
        return replies[0] if single and params.n == 1 else replies

    def generate_batch(self, prompts: Sequence[str], **options: Any) -> list[GenerateReply]:
        """Like :meth:`generate` for a list of texts; always a list."""
        replies = self.generate(list(prompts), **options)
        return replies if isinstance(replies, list) else [replies]

    async def agenerate(self, *args: Any, **options: Any) -> GenerateReply | list[GenerateReply]:
        """Like :meth:`generate`, for code that runs in an event loop."""
        return await asyncio.to_thread(self.generate, *args, **options)

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        sampling_params: SamplingParams | dict[str, Any] | None = None,
        return_logprobs: bool = False,
        **sampling: Any,
    ) -> Iterator[GenerateReply]:
        """Generate one sequence and yield it as it grows; each reply holds all tokens so far.

        Args:
            prompt: text or token ids.
            sampling_params: how tokens are drawn; ``n`` must be 1.
            return_logprobs: report the log-prob of every response token.
            **sampling: single sampling arguments, as in :meth:`generate`.

        Raises:
            ConfigError: bad prompt or sampling arguments; nothing was sent.
            ServerError: also in the middle of the stream.
        """
        params = _sampling(sampling_params, sampling)
        if params.n != 1:
            raise ConfigError(f"a stream carries one sequence, got n={params.n}")
        ids_T = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        return self.pool.stream(ids_T, params, return_logprobs=return_logprobs)

    def flush_cache(self) -> None:
        """Empty every server's prefix cache.

        Raises:
            RequestRejectedError: a server has requests running.
        """
        for outcome in self.pool.fan_out(lambda client: build_flush()).values():
            outcome.unwrap()

    # ------------------------------------------------------------------ weights, without a collector

    def get_model_metadata(self) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """Names, dtypes and shapes of the tensors that :meth:`update_weights` expects: the served checkpoint's.

        Raises:
            ConfigError: the checkpoint can't be read from this machine.
        """
        specs = Checkpoint.read(self.pool.info.model_path).specs
        return {name: (spec.dtype, torch.Size(spec.shape)) for name, spec in specs.items()}

    def get_master_address(self) -> str:
        """The trainer's address that the servers will be told to meet at."""
        return self._sync_config.master_address or reachable_address([client.url for client in self.pool.clients])

    def get_master_port(self) -> int | None:
        """The port they will be told; ``None`` until it is chosen, when the weight group is made."""
        return self._sync_config.master_port

    def init_weight_update_group(self, master_address: str | None = None, master_port: int | None = None) -> None:
        """Make the process group that weights travel over. Done by the first update when it isn't done before.

        Args:
            master_address: address of this process as the servers reach it; by default that of the interface that
                leads to them.
            master_port: port to listen on; by default a free one.

        Raises:
            ConfigError: the address can't be listened on, or the servers can't take weights.
            WeightUpdateError: a server did not join.
        """
        self._close_sync()
        self._sync_config = replace(self._sync_config, master_address=master_address, master_port=master_port)
        self._weight_sync.connect()

    def update_weights(self, weights: Any) -> SyncReport | None:
        """Send weights to all servers; the same machinery as :class:`~torchrl_sglang.SGLangWeightSyncScheme`.

        Args:
            weights: a module, TensorDict, dict, or an iterator of ``(name, tensor)``.

        Returns:
            What was done.

        Raises:
            WeightSyncError: see :meth:`WeightSync.push`.
        """
        return self._weight_sync.push(weights)

    def update_weights_from_distributed(
        self, name: str, dtype: torch.dtype, shape: Sequence[int], tensor: torch.Tensor
    ) -> SyncReport | None:
        """Send one tensor; the others stay as they are.

        TorchRL's in-tree method of this name only announces the tensor and leaves the broadcast to its caller, who
        can't make it while the announcement waits for it. So the tensor is taken here.

        Args:
            name: name in the checkpoint.
            dtype: dtype of ``tensor``.
            shape: shape of ``tensor``.
            tensor: the values.

        Raises:
            ConfigError: ``tensor`` is not what ``dtype`` and ``shape`` say.
            WeightSyncError: see :meth:`WeightSync.push`.
        """
        if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
            raise ConfigError(
                f"{name} was announced as {dtype} {tuple(shape)}, but is {tensor.dtype} {tuple(tensor.shape)}"
            )
        return self._weight_sync.push({name: tensor}, partial=True)

    @property
    def _weight_sync(self) -> WeightSync:
        if self._sync is None:
            self._sync = WeightSync(self.pool, self._sync_config, restart=self.restart)
        return self._sync

    def _close_sync(self) -> None:
        if self._sync is not None:
            self._sync.close()
            self._sync = None

    # ------------------------------------------------------------------ life

    def restart(self, url: str) -> bool:
        """End and start again the server at ``url``, at the same address and with the checkpoint it was launched from.

        Returns:
            ``False`` if this engine did not launch it: then nothing is done.

        Raises:
            ServerStartError: it did not come up again.
        """
        for client, server in zip(self.pool.clients, self.servers, strict=False):
            if client.url == url:
                server.restart()
                return True
        return False

    def shutdown(self) -> None:
        """Close connections and end the servers this engine launched. Safe to call twice."""
        self._close_sync()
        self.pool.close()
        stop_fleet(self.servers, kill=True)  # nothing of a server outlives it, and asking nicely takes up to 10 s

    def __enter__(self) -> AsyncSGLang:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()

    def __getstate__(self) -> dict[str, Any]:
        return {"pool": self.pool}  # a copy attaches; processes and tokenizer stay with the original

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["pool"])  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"AsyncSGLang({[client.url for client in self.pool.clients]}, owns={len(self.servers)})"


def load_tokenizer(pool: SGLangPool) -> PreTrainedTokenizerBase:
    """The tokenizer that the servers of ``pool`` were told to use.

    Raises:
        ConfigError: its path can't be read from this machine.
    """
    from transformers import AutoTokenizer  # slow to import, and not needed for token-only use

    path = pool.info.tokenizer_path
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the served tokenizer {path!r} can't be loaded here ({error}); pass tokenizer=") from error


def _sampling(given: SamplingParams | dict[str, Any] | None, single: dict[str, Any]) -> SamplingParams:
    if given is not None and single:
        raise ConfigError(f"give sampling_params or single arguments, not both: {sorted(single)}")
    if isinstance(given, SamplingParams):
        return given
    return SamplingParams.from_kwargs(**(given or single))


def _refuse_unknown(given: dict[str, Any], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise ConfigError(f"unknown argument {name!r}.{nearest_name(name, known)}")
