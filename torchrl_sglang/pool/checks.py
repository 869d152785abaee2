"""Checks of servers and replies: one model in a pool, and no token from half-updated weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from torchrl_sglang.errors import ConfigError, WeightSyncError
from torchrl_sglang.model_files import read_model_json
from torchrl_sglang.protocol.messages import GenerateReply, ServerInfo, WeightSpan
from torchrl_sglang.protocol.model_limits import find_unsupported
from torchrl_sglang.protocol.version import WeightVersion
from torchrl_sglang.server_url import resolved_addresses

__all__ = [
    "label_with_version",
    "process_mark",
    "refuse_different_models",
    "refuse_mixed_weights",
    "refuse_newcomers",
    "refuse_same_server",
    "refuse_unlike",
]

_ALIKE = ("dp_size", "pp_size", "quantization", "device", "lora_enabled")
_ALIKE_FLAGS = ("max_lora_rank", "lora_target_modules")
"""What decides whether a server takes weights and adapters as the others do."""
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
_MUCH_SHORTER = 0.9
"""Where the cache limits the context, equal servers differ a little, by the memory that each has found."""


def refuse_different_models(infos: Sequence[ServerInfo]) -> None:
    """Require that all servers serve the same generating model, and compute it as transformers does.

    Raises:
        ConfigError: they serve different models, one that generates no text, or one of which SGLang ignores a setting.
    """
    first = infos[0]
    vocab_size = next((info.vocab_size for info in infos if info.vocab_size is not None), None)
    for info in infos:
        if not info.is_generation:
            raise ConfigError(f"{info.url} serves {info.model_path!r}, which does not generate text")
        if info.architectures != first.architectures or info.vocab_size not in (None, vocab_size):
            raise ConfigError(
                f"{first.url} serves {first.model_path!r} and {info.url} serves {info.model_path!r}: "
                "one pool needs servers of one model"
            )
        if info.model_path == first.model_path and info.revision != first.revision:
            raise ConfigError(
                f"{first.url} serves revision {first.revision} of {first.model_path!r} and {info.url} revision "
                f"{info.revision}: one pool needs servers of one model"
            )
        if (unlike := _unlike_sizes(first, info)) is not None:
            raise ConfigError(
                f"{first.url} serves {first.model_path!r} and {info.url} serves {info.model_path!r}, models of other "
                f"sizes ({unlike}): one pool needs servers of one model"
            )
        if not _same_tokens(first, info):
            raise ConfigError(
                f"{first.url} has the tokenizer {first.tokenizer_path!r} and {info.url} has {info.tokenizer_path!r}, "
                "which gives tokens other ids: one pool needs servers of one tokenizer"
            )
        _refuse_unsupported_model(info)


def _same_tokens(first: ServerInfo, other: ServerInfo) -> bool:
    """Whether no id stands for another token on the other server, as far as their files can be read here.

    Files of one tokenizer differ: each version of ``tokenizers`` writes merges and flags in its own way.
    """
    if other.tokenizer_path == first.tokenizer_path:
        return True
    files = [read_model_json(info.tokenizer_path, "tokenizer.json", info.revision) for info in (first, other)]
    ours, theirs = (_tokens_by_id(file or {}) for file in files)
    return all(theirs.get(index, token) == token for index, token in ours.items())


def _tokens_by_id(tokenizer: Mapping[str, Any]) -> dict[tuple[str, int], str]:
    """The tokens in a ``tokenizer.json``, by where they are listed and their id.

    A vocabulary is a mapping, or with Unigram a list of tokens and scores.
    """
    vocab = (tokenizer.get("model") or {}).get("vocab") or {}
    listed = vocab.items() if isinstance(vocab, dict) else ((entry[0], index) for index, entry in enumerate(vocab))
    added = {("added", each["id"]): each["content"] for each in tokenizer.get("added_tokens") or ()}
    return {("vocab", index): token for token, index in listed} | added


def _unlike_sizes(first: ServerInfo, other: ServerInfo) -> str | None:
    """A size in which the models of two servers differ, of the checkpoints that can be read here; ``None`` if none."""
    if other.model_path == first.model_path:
        return None
    configs = [read_model_json(info.model_path, "config.json", info.revision) or {} for info in (first, other)]
    sizes = [{**config, **(config.get("text_config") or {})} for config in configs]
    for name in _SIZES:
        values = [size.get(name) for size in sizes]
        if None not in values and values[0] != values[1]:
            return f"{name} is {values[0]} and {values[1]}"
    return None


def refuse_same_server(new: Sequence[ServerInfo], members: Sequence[ServerInfo] = ()) -> None:
    """Require that no two URLs lead to one server, which would be sent every weight update twice at once.

    A server at an address that another one has is another server if its path or its process differs: an ingress has one
    address for many.

    Args:
        new: the servers to check, each against those before it and the members.
        members: the servers of the pool.

    Raises:
        ConfigError: two are one.
    """
    known = {info.url: _place(info) for info in members}
    for info in new:
        addresses, *place = _place(info)
        for url, (known_addresses, *known_place) in known.items():
            if place == known_place and addresses & known_addresses:
                fixed = (
                    " (if they are two behind one address: both report the same --random-seed, leave it out)"
                    if urlsplit(info.url).hostname != urlsplit(url).hostname
                    else ""
                )
                raise ConfigError(f"{info.url} is a server of this pool already, under the name {url}{fixed}")
        known[info.url] = _place(info)


def _place(info: ServerInfo) -> tuple[frozenset[tuple[str, int]], str, object]:
    return resolved_addresses(info.url), urlsplit(info.url).path, process_mark(info.raw)


def process_mark(server_info: Mapping[str, Any]) -> tuple[object, str] | None:
    """What tells a server's process from others: the random seed that SGLang draws, and how long its start took.

    The seed may be fixed with ``--random-seed``; the times are there from SGLang 0.5.23 on, to the microsecond.

    Args:
        server_info: the answer to ``/server_info``.

    Returns:
        ``None`` if the server reports neither.
    """
    seed, times = server_info.get("random_seed"), server_info.get("startup_time")
    return None if seed is None and not times else (seed, repr(times))


def refuse_newcomers(
    new: Sequence[ServerInfo],
    members: Sequence[ServerInfo],
    *,
    updates: bool,
    is_left_behind: Callable[[str], bool] = lambda version: False,
) -> None:
    """Require that servers fit into a pool that generates: as when a pool connects, and as the pool is in use.

    Args:
        new: the newcomers.
        members: the servers of the pool.
        updates: this process sends weights to the pool.
        is_left_behind: whether the update that has left a dirty version was ours, or that of a trainer that has ended:
            our next one heals it.

    Raises:
        ConfigError: a newcomer serves another model, takes shorter prompts than were accepted so far, would not take
            weights as the members do, or is in the middle of an update.
    """
    refuse_unlike(new, members, updates=updates)
    for info in new:
        if info.weight_version.startswith("dirty-") and not is_left_behind(info.weight_version):
            raise ConfigError(
                f"{info.url} holds half-updated or unverified weights ({info.weight_version}): another process is "
                "updating it, or died in an update. Restart it before it joins, or wait until that update is over"
            )


def refuse_unlike(new: Sequence[ServerInfo], members: Sequence[ServerInfo], *, updates: bool) -> None:
    """Require that servers are like those of a pool, whatever weights they hold.

    Args:
        new: the servers to check.
        members: the servers of the pool, or what one of ``new`` was before its process was replaced.
        updates: this process sends weights to the pool.

    Raises:
        ConfigError: one serves another model, takes shorter prompts than were accepted so far, or would not take
            weights as the members do.
    """
    refuse_different_models([members[0], *new])
    for info in new:
        limits = [each.context_length for each in members if each.context_length is not None]
        if limits and info.context_length is not None and info.context_length < _MUCH_SHORTER * min(limits):
            raise ConfigError(
                f"{info.url} has context_length={info.context_length}, and this pool's servers {min(limits)}: prompts "
                "that the pool has accepted would not fit. Start it with their --context-length"
            )
        for name in (*_ALIKE, *_ALIKE_FLAGS) if updates else ():
            held = [_setting(each, name) for each in members]
            if _setting(info, name) not in held:
                raise ConfigError(
                    f"{info.url} was started with {name}={_setting(info, name)!r}, and this pool's servers with "
                    f"{held[0]!r}: weight updates need servers that are alike. Start it with the same settings"
                )


def _setting(info: ServerInfo, name: str) -> object:
    value = getattr(info, name) if name in _ALIKE else info.raw.get(name)
    return sorted(map(str, value)) if isinstance(value, (list, tuple, set)) else value


def _refuse_unsupported_model(info: ServerInfo) -> None:
    """Require that the server computes the model as transformers does. Nothing is known of a checkpoint elsewhere.

    Raises:
        ConfigError: SGLang ignores a setting of the checkpoint, and so returns wrong log-probs.
    """
    problems = find_unsupported(
        read_model_json(info.model_path, "config.json", info.revision),
        attention_backend=info.raw.get("attention_backend"),
        context_length=info.context_length,
    )
    if problems:
        raise ConfigError(
            f"{info.url} does not compute {info.model_path!r} as transformers does: {'; '.join(problems)}. Launch the "
            "server in another way"
        )


def label_with_version(version: str, reply: GenerateReply) -> GenerateReply:
    """Give a reply an adapter's version, since servers don't count adapters as weight versions.

    A request keeps the adapter that it began with, so all its tokens have one version.
    """
    span = WeightSpan(version=version, start=0, end=len(reply.output_ids))
    return replace(reply, weight_version=version, weight_spans=(span,))


def refuse_mixed_weights(replies: Sequence[GenerateReply]) -> None:
    """Require that no token was generated with half-updated weights.

    Raises:
        WeightSyncError: a server generated with weights that are marked dirty.
    """
    for reply in replies:
        if any(WeightVersion.parse(span.version).dirty for span in reply.weight_spans if span.end > span.start):
            raise WeightSyncError(
                f"{reply.server} generated with half-updated or unverified weights ({reply.weight_version}); the batch "
                "is thrown away. servers.update_weights(model) sends the weights again",
                server_weights={reply.server: "mixed"},
            )
