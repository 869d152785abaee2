"""Fields that vLLM, SGLang and other servers take beside OpenAI's: honoured, without effect here, or refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torchrl_sglang.agents.http.api_errors import bad_request
from torchrl_sglang.agents.http.fields import Fields
from torchrl_sglang.agents.http.sampling_fields import read_grammar

__all__ = ["add_grammar", "add_stop_trim", "ignore_foreign", "read_variables", "refuse_foreign"]

# They choose a server, a cache or a backend, or name the request, and change no token.
_WITHOUT_EFFECT = (
    *("request_id", "rid", "session_id", "priority", "cache_salt", "cache_prompt", "id_slot", "extra_key"),
    *("provider", "route", "usage", "data_parallel_rank", "guided_decoding_backend", "spaces_between_special_tokens"),
)
_TRIMMED = "stop strings are trimmed; send one of include_stop_str_in_output and no_stop_trim"
# What asks for the case here: field -> what to do instead, and the values that ask for the case.
_AS_HERE: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "skip_special_tokens": ("contents have no special tokens; return_token_ids and logprobs have every token", (True,)),
    "use_beam_search": ("SGLang has no beam search", (False,)),
    "length_penalty": ("SGLang has no beam search", (1, 1.0)),
    "early_stopping": ("SGLang has no beam search", (False,)),
    "truncate_prompt_tokens": ("all of the prompt is sent; shorten the conversation", ()),
    "transforms": ("all of the prompt is sent; shorten the conversation", ()),
    "prompt_logprobs": ("the gateway scores no prompts; ask the SGLang server itself", ()),
    "bad_words": ("send logit_bias with their token ids", ()),
    "allowed_token_ids": ("send logit_bias, or a regex", ()),
    "logits_processors": ("they would change what is sampled; send logit_bias", ()),
    "custom_logit_processor": ("it would change what is sampled; send logit_bias", ()),
    "lora_path": ("the adapter is the gateway's: SessionSettings.adapter", ()),
    "return_hidden_states": ("the gateway returns tokens and log-probs alone", (False,)),
    "return_routed_experts": ("the gateway returns tokens and log-probs alone", (False,)),
    "extra_body": ("its fields belong into the request itself, where clients' extra_body= puts them", ()),
}
_THINKING_OFF, _REASONING_OFF = {"type": "disabled"}, {"enabled": False}
_CHAT_AS_HERE: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "add_special_tokens": ("the chat template writes them", (False,)),
    "continue_final_message": ("an answer begins anew; say in a user's message how it is to begin", (False,)),
    "add_generation_prompt": ("the prompt ends where an answer begins", (True,)),
    "echo": ("an answer is what the model adds", (False,)),
    "best_of": ("send n=, and choose yourself", (1,)),
    "separate_reasoning": ("thinking is returned as reasoning_content", (True,)),
    "include_reasoning": ("thinking is returned as reasoning_content", (True,)),
    "stream_reasoning": ("thinking is streamed as it is generated", (True,)),
    "thinking": ("the chat template decides: send chat_template_kwargs", (_THINKING_OFF,)),
    "reasoning": ("send reasoning_effort, or chat_template_kwargs", (_REASONING_OFF, {"exclude": False})),
    "chat_template": ("it is the gateway's: SessionSettings.chat_template", ()),
    "documents": ("send chat_template_kwargs, if the chat template reads documents", ()),
    "plugins": ("give the model tools", ()),
}
_ALL_CHAT_AS_HERE = {**_AS_HERE, **_CHAT_AS_HERE}


def ignore_foreign(fields: Fields) -> None:
    """Read what changes no token."""
    fields.ignore(*_WITHOUT_EFFECT)


def refuse_foreign(fields: Fields, *, is_chat: bool) -> None:
    """Refuse what can't be honoured, unless it asks for what is the case here.

    Raises:
        ApiError: it asks for something else.
    """
    rules = _ALL_CHAT_AS_HERE if is_chat else _AS_HERE
    for name in fields.given(tuple(rules)):
        why, neutral = rules[name]
        fields.refuse(name, why, neutral=neutral)


def add_stop_trim(sampling: dict[str, Any], fields: Fields) -> None:
    """Put whether an answer keeps the stop string that ended it, which has two names, into ``sampling``.

    Raises:
        ApiError: the names say different things.
    """
    given = {fields.flag(name) for name in ("include_stop_str_in_output", "no_stop_trim")} - {None}
    if len(given) > 1:
        raise bad_request(_TRIMMED, "no_stop_trim")
    if True in given:
        sampling["no_stop_trim"] = True


def read_variables(fields: Fields) -> dict[str, Any]:
    """Variables of the chat template: ``chat_template_kwargs``, and fields by which some servers switch thinking.

    ``enable_thinking``; ``thinking`` and ``reasoning`` can only switch it off.

    Raises:
        ApiError: a value of the wrong type.
    """
    variables: dict[str, Any] = {}
    if fields.any("thinking") == _THINKING_OFF or fields.any("reasoning") == _REASONING_OFF:
        variables.update(enable_thinking=False, thinking=False)  # the names in Qwen3's and in DeepSeek's templates
    thinks = fields.flag("enable_thinking")
    if thinks is not None:
        variables["enable_thinking"] = thinks
    return {**variables, **(fields.object("chat_template_kwargs") or {})}


# ------------------------------------------------------------------ grammars


def add_grammar(sampling: dict[str, Any], fields: Fields) -> None:
    """Put the one grammar that a request asks for, in any of the servers' fields, into ``sampling``.

    Raises:
        ApiError: two fields ask for grammars, or one is in another form.
    """
    found: dict[str, dict[str, Any]] = {}
    form = fields.object("response_format")
    if form is not None:
        found["response_format"] = read_grammar(Fields(form, "response_format"))
    found.update({name: {name: sampling[name]} for name in ("regex", "ebnf") if name in sampling})
    structured = fields.object("structured_outputs")
    if structured:
        inner = Fields(structured, "structured_outputs")
        found.update(_by_kind(inner, ""))
        inner.refuse_unread()
    found.update(_by_kind(fields, "guided_"))
    given = {name: grammar for name, grammar in found.items() if grammar}
    if len(given) > 1:
        raise bad_request(f"{' and '.join(given)} both constrain the answer: send one", next(iter(given)))
    sampling.update(*given.values())


def _by_kind(fields: Fields, prefix: str) -> dict[str, dict[str, Any]]:
    """The grammars of vLLM's ``guided_json``, ``guided_regex``..., or of ``structured_outputs.json``..., by field."""
    found: dict[str, dict[str, Any]] = {}
    for kind, read in {"json": _schema, "regex": _regex, "choice": _choice, "grammar": _ebnf}.items():
        if (value := fields.any(f"{prefix}{kind}")) is not None:
            found[fields.path(f"{prefix}{kind}")] = read(value, fields.path(f"{prefix}{kind}"))
    if fields.flag(f"{prefix}json_object"):
        found[fields.path(f"{prefix}json_object")] = {"json_schema": {"type": "object"}}
    return found


def _schema(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, (dict, str)):
        raise bad_request(f"{path} must be a JSON schema, or its text, got {value!r:.100}", path)
    return {"json_schema": value}


def _regex(value: Any, path: str) -> dict[str, Any]:
    return {"regex": _text(value, path)}


def _ebnf(value: Any, path: str) -> dict[str, Any]:
    return {"ebnf": _text(value, path)}


def _choice(value: Any, path: str) -> dict[str, Any]:
    r"""A regular expression of some texts.

    Examples:
        >>> _choice(["yes", "no."], "guided_choice")
        {'regex': '(yes|no\\.)'}
    """
    if not isinstance(value, list) or not value or not all(isinstance(each, str) and each for each in value):
        raise bad_request(f"{path} must be a list of texts, got {value!r:.100}", path)
    escaped = [re.sub(r"[\\.^$*+?{}\[\]|()/-]", r"\\\g<0>", each) for each in value]
    return {"regex": f"({'|'.join(escaped)})"}


def _text(value: Any, path: str) -> str:
    if not isinstance(value, str) or not value:
        raise bad_request(f"{path} must be a non-empty string, got {value!r:.100}", path)
    return value
