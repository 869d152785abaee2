"""Build policy, servers and weight sync scheme from YAML, following TorchRL's hydra conventions.

After :func:`register_hydra_configs` a config can contain::

    defaults:
      - sglang_engine@engine: default
      - sglang_policy@policy: default
      - weight_sync_scheme@weight_sync_schemes.policy: sglang
      - _self_
    engine: {model: Qwen/Qwen3-0.6B, dp_size: 2}
    policy: {engine: ${engine}, input_mode: history, generate_kwargs: {max_new_tokens: 256}}
    weight_sync_schemes:
      policy: {servers: ${engine}, config: {bucket_bytes: 67108864}}

``hydra.utils.instantiate``, or :func:`build`, which passes this package's errors on unwrapped, builds policy and scheme
on one engine: hydra copies ``${engine}`` to both nodes, and
:func:`shared_engine` returns the same engine for equal arguments until :func:`close_engines` is called.
"""

from __future__ import annotations

import atexit
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchrl_sglang.config import SyncConfig
from torchrl_sglang.engine import AsyncSGLang
from torchrl_sglang.errors import ConfigError, SGLangError
from torchrl_sglang.rollout import SGLangWrapper
from torchrl_sglang.weights import SGLangWeightSyncScheme

__all__ = [
    "SGLangEngineConfig",
    "SGLangPolicyConfig",
    "SGLangWeightSyncSchemeConfig",
    "build",
    "close_engines",
    "make_policy",
    "make_scheme",
    "register_hydra_configs",
    "shared_engine",
]

_engines: dict[str, AsyncSGLang] = {}


def build(node: Any, **settings: Any) -> Any:
    """``hydra.utils.instantiate``, with this package's errors as they are.

    Hydra wraps every error in an ``InstantiationException`` that quotes the message with its line breaks escaped.

    Args:
        node: a node with ``_target_``.
        **settings: added to the node's.

    Raises:
        SGLangError: the one that the target raised.
        ConfigError: the target refused the node's settings, or does not exist.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(node, **settings)
    except InstantiationException as error:
        cause: BaseException = error
        while cause.__cause__ is not None and not isinstance(cause, SGLangError):
            cause = cause.__cause__
        if isinstance(cause, SGLangError):
            raise cause from None
        raise ConfigError(f"{node.get('_target_')} can't be built: {cause}") from error


def shared_engine(
    url: str | Sequence[str] | None = None,
    model: str | None = None,
    *,
    name: str | None = None,
    progress: Callable[[str], None] | bool | None = None,
    **settings: Any,
) -> AsyncSGLang:
    """Return the engine for these arguments; the first call makes it, later calls return the same object.

    Args:
        url: base URL(s) of running servers to attach to; exclusive with ``model``.
        model: the checkpoint to launch servers with.
        name: distinguishes engines with otherwise equal arguments.
        progress: shows how far launched servers are, see :meth:`AsyncSGLang.from_pretrained`.
        **settings: further arguments of :meth:`AsyncSGLang.connect` or :meth:`AsyncSGLang.from_pretrained`.

    Raises:
        ConfigError: neither or both of ``url`` and ``model`` are given, or the engine refuses a setting.
    """
    if (url is None) == (model is None):
        raise ConfigError("an engine needs either url (running servers) or model (servers to launch)")
    settings = {name: _plain(value) for name, value in settings.items() if value is not None}
    url = _plain(url)
    key = json.dumps({"url": url, "model": model, "name": name, **settings}, sort_keys=True, default=str)
    if key not in _engines:
        engine = (
            AsyncSGLang.connect(url, **settings)
            if url is not None
            else AsyncSGLang.from_pretrained(str(model), progress=progress, **settings)
        )
        if not _engines:
            atexit.register(close_engines)
        _engines[key] = engine
    return _engines[key]


def close_engines() -> None:
    """Stop all servers that :func:`shared_engine` launched and close all connections; later calls make new engines."""
    atexit.unregister(close_engines)
    while _engines:
        _engines.popitem()[1].shutdown()


def make_policy(engine: Any, **settings: Any) -> SGLangWrapper:
    """Make a policy on an engine; ``settings`` are arguments of :class:`SGLangWrapper`, ``None`` means its default."""
    given = {name: value for name, value in settings.items() if value is not None}
    if "template_kwargs" in given:  # a template's tests and filters know Python's lists and mappings only
        given["template_kwargs"] = _plain(given["template_kwargs"])
    return SGLangWrapper(_engine_of(engine), **given)


def make_scheme(servers: Any, config: Mapping[str, Any] | SyncConfig | None = None) -> SGLangWeightSyncScheme:
    """Make a weight sync scheme for an engine; ``config`` holds fields of :class:`SyncConfig`."""
    sync = config if isinstance(config, SyncConfig) else SyncConfig(**dict(config or {}))
    return SGLangWeightSyncScheme(_engine_of(servers), config=sync)


def _engine_of(value: Any) -> Any:
    """Resolve an engine node: hydra passes nested nodes as objects if they have a ``_target_``, else as mappings."""
    if isinstance(value, Mapping):
        return shared_engine(**{str(name): inner for name, inner in value.items() if name != "_target_"})
    return value


def _plain(value: Any) -> Any:
    """Convert omegaconf's lists and mappings to Python's."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    return [_plain(each) for each in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


@dataclass
class SGLangEngineConfig:
    """Node for :func:`shared_engine`."""

    url: Any = None
    model: str | None = None
    name: str | None = None
    tp_size: int | None = None
    dp_size: int | None = None
    gpus: Any = None
    device: str | None = None
    dtype: str | None = None
    python: str | None = None
    context_length: int | None = None
    mem_fraction_static: float | None = None
    max_total_tokens: int | None = None
    extra_args: Any = None
    env: Any = None
    restart: str | None = None
    router: Any = None
    api_key: Any = None
    """``false`` launches servers without a key. A key itself would be in every copy of the configuration."""
    api_key_file: str | None = None
    admin_api_key_file: str | None = None
    _target_: str = "torchrl_sglang.hydra_configs.shared_engine"
    _partial_: bool = False


@dataclass
class SGLangPolicyConfig:
    """Node for :class:`~torchrl_sglang.SGLangWrapper`."""

    engine: Any = None
    tokenizer: str | None = None
    input_mode: str = "history"
    generate: bool = True
    generate_kwargs: Any = field(default_factory=dict)
    num_samples: int | None = None
    pad_output: bool = False
    chat_template: str | None = None
    template_kwargs: Any = None
    prefer_tokens: Any = False
    return_log_probs: bool | None = None
    on_overlong: str | None = None
    on_error: str | None = None
    progress: bool | None = None
    max_resumes: int | None = None
    _target_: str = "torchrl_sglang.hydra_configs.make_policy"
    _partial_: bool = False


@dataclass
class SGLangWeightSyncSchemeConfig:
    """Node for :class:`~torchrl_sglang.SGLangWeightSyncScheme`; ``config`` holds fields of ``SyncConfig``."""

    servers: Any = None
    config: Any = field(default_factory=dict)
    _target_: str = "torchrl_sglang.hydra_configs.make_scheme"
    _partial_: bool = False


def register_hydra_configs() -> None:
    """Register the config groups ``sglang_engine`` and ``sglang_policy``, and ``sglang`` in ``weight_sync_scheme``.

    Raises:
        ConfigError: hydra is not installed.
    """
    try:
        from hydra.core.config_store import ConfigStore
    except ImportError as error:
        raise ConfigError("hydra is not installed: pip install 'torchrl-sglang[recipes]'") from error
    store = ConfigStore.instance()
    store.store(group="sglang_engine", name="default", node=SGLangEngineConfig)
    store.store(group="sglang_policy", name="default", node=SGLangPolicyConfig)
    store.store(group="weight_sync_scheme", name="sglang", node=SGLangWeightSyncSchemeConfig)
