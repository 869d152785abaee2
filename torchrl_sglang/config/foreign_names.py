"""What arguments of vLLM, Hugging Face and TorchRL's backends are called here, for errors about unknown arguments.

Each table maps a name to its counterpart, in Markdown: the page ``docs/migration.md`` shows the same rows. Names that
are accepted as they are (``max_model_len``, ``max_tokens``...) are not listed; their modules translate them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torchrl_sglang.config.checking import nearest_name

__all__ = [
    "CONNECT_ARGUMENTS",
    "ENGINE_ARGUMENTS",
    "GENERATION_ARGUMENTS",
    "POLICY_ARGUMENTS",
    "SCHEME_ARGUMENTS",
    "unknown_argument",
]

ENGINE_ARGUMENTS: Mapping[str, str] = {
    "enable_lora": '`extra_args=("--enable-lora", "--max-lora-rank", "16", "--lora-target-modules", "all")`',
    "max_lora_rank": '`extra_args=("--max-lora-rank", "16")`',
    "max_loras": '`extra_args=("--max-loras-per-batch", "8")`',
    "max_num_seqs": '`extra_args=("--max-running-requests", "64")`',
    "max_num_batched_tokens": '`extra_args=("--chunked-prefill-size", "8192")`',
    "enable_chunked_prefill": 'on by default; `extra_args=("--chunked-prefill-size", "-1")` switches it off',
    "enable_prefix_caching": 'on by default; `extra_args=("--disable-radix-cache",)` switches it off',
    "enforce_eager": '`extra_args=("--disable-cuda-graph",)`; CPU servers use no CUDA graphs',
    "compile": '`extra_args=("--enable-torch-compile",)`; off by default',
    "trust_remote_code": '`extra_args=("--trust-remote-code",)`',
    "quantization": (
        '`extra_args=("--quantization", "fp8")`; a server that quantises its weights can\'t take weight updates'
    ),
    "kv_cache_dtype": '`extra_args=("--kv-cache-dtype", "fp8_e5m2")`',
    "block_size": '`extra_args=("--page-size", "16")`',
    "seed": (
        '`extra_args=("--random-seed", "0")`; for one request `generate_kwargs={"seed": 0}`, which needs '
        "`--enable-deterministic-inference`"
    ),
    "tokenizer": '`extra_args=("--tokenizer-path", path)`; the policy takes `tokenizer=` too',
    "tokenizer_mode": '`extra_args=("--tokenizer-mode", "slow")`',
    "skip_tokenizer_init": "leave it out: the policy sends and receives token ids in any case",
    "revision": '`extra_args=("--revision", "main")`',
    "download_dir": '`extra_args=("--download-dir", path)`',
    "load_format": '`extra_args=("--load-format", "auto")`; `dummy` is for tests',
    "served_model_name": '`extra_args=("--served-model-name", "name")`',
    "hf_overrides": '`extra_args=("--json-model-override-args", \'{"rope_scaling": null}\')`',
    "cpu_offload_gb": '`extra_args=("--cpu-offload-gb", "4")`',
    "swap_space": "does not exist: SGLang computes the KV cache of a preempted request again",
    "guided_decoding_backend": '`extra_args=("--grammar-backend", "xgrammar")`',
    "reasoning_parser": '`extra_args=("--reasoning-parser", "qwen3")`',
    "tool_call_parser": '`extra_args=("--tool-call-parser", "qwen25")`',
    "enable_auto_tool_choice": '`extra_args=("--tool-call-parser", "qwen25")`',
    "chat_template": '`SGLangWrapper(chat_template=)`; for OpenAI clients `extra_args=("--chat-template", path)`',
    "enable_sleep_mode": '`extra_args=("--enable-memory-saver",)` and `with servers.offloaded():`',
    "enable_fp32_output": '`extra_args=("--enable-fp32-lm-head",)`',
    "disable_custom_all_reduce": '`extra_args=("--disable-custom-all-reduce",)`',
    "pipeline_parallel_size": "`tp_size`, or more servers with `dp_size`: pipeline stages can't take weight updates",
    "enable_expert_parallel": '`extra_args=("--ep-size", "8")`',
    "distributed_executor_backend": "leave it out: servers are processes; on a Ray cluster `launch_ray_servers`",
    "worker_extension_cls": "leave it out: unmodified SGLang servers take the weights over their own HTTP calls",
    "speculative_config": '`extra_args=("--speculative-algorithm", "EAGLE")` and the flags that go with it',
    "limit_mm_per_prompt": '`extra_args=("--limit-mm-data-per-request", \'{"image": 4}\')`',
    "disable_log_stats": "leave it out: servers log to a file, see `ServerConfig.log_dir`",
    "disable_log_requests": "leave it out: SGLang does not log requests unless asked to",
    "verbose": "leave it out: `progress=print` shows how the servers load",
    "num_gpus_per_worker": "`tp_size`",
    "device_map": "`gpus=[[0, 1], [2, 3]]`: the GPUs of each server",
    "torch_dtype": '`dtype="bfloat16"`',
    "cuda_devices": "`gpus=[[0, 1], [2, 3]]`: the GPUs of each server",
    "timeout": "`client=ClientConfig(generate_timeout_s=...)`, and one field for each other kind of call",
    "server_url": '`AsyncSGLang.connect("http://host:30000")`',
}
"""Arguments of engines."""

CONNECT_ARGUMENTS: Mapping[str, str] = {
    "timeout": "`generate_timeout_s=...`, or the field of `ClientConfig` for another kind of call",
    "key": "`api_key=...`",
    "token": "`api_key=...`",
    "host": '`"http://host:30000"`, the first argument',
    "port": '`"http://host:30000"`, the first argument',
    "server_url": '`"http://host:30000"`, the first argument',
    "base_url": '`"http://host:30000"`, the first argument',
    "max_retries": "`connect_retries=...`: only requests that cannot have run are sent again",
    "retries": "`connect_retries=...`: only requests that cannot have run are sent again",
    "verify_ssl": "`ca_certificate=...`, the private authority's certificate",
}
"""Arguments with which one attaches to running servers."""

GENERATION_ARGUMENTS: Mapping[str, str] = {
    "best_of": "`num_samples`, and choose by `log_probs.response` yourself",
    "use_beam_search": "SGLang has no beam search",
    "guided_decoding": '`json_schema`, `regex` or `ebnf` (with `extra_args=("--grammar-backend", "xgrammar")`)',
    "structured_outputs": '`json_schema`, `regex` or `ebnf` (with `extra_args=("--grammar-backend", "xgrammar")`)',
    "guided_json": "`json_schema`, the schema as JSON text",
    "guided_regex": "`regex`",
    "guided_grammar": "`ebnf`",
    "guided_choice": '`regex="(yes|no)"`',
    "response_format": "`json_schema`, the schema as JSON text",
    "detokenize": 'leave it out: `input_mode="tokens"` decodes nothing',
    "bad_words": '`logit_bias={"<token id>": -100}`',
    "allowed_token_ids": "`regex`, or `logit_bias` for the ids that are not allowed",
    "truncate_prompt_tokens": '`SGLangWrapper(on_overlong="truncate_left")`',
    "logits_processors": "`logit_bias`, or `custom_params` with a processor that the server knows",
    "output_kind": "leave it out: `servers.stream(...)` yields a reply as it grows",
    "max_length": "`max_new_tokens`, which does not count the prompt",
    "min_length": "`min_new_tokens`, which does not count the prompt",
    "max_completion_tokens": "`max_new_tokens`",
    "pad_token_id": "leave it out: servers take prompts of different lengths; the policy pads with its tokenizer",
    "bos_token_id": "leave it out: the tokenizer or the chat template writes it",
    "typical_p": "does not exist in SGLang: `top_p` or `min_p`",
    "no_repeat_ngram_size": "does not exist in SGLang: `frequency_penalty` or `repetition_penalty`",
    "bad_words_ids": '`logit_bias={"<token id>": -100}`',
    "stop_words": "`stop`",
    "stopping_criteria": "`stop`, `stop_token_ids` or `stop_regex`",
    "return_dict_in_generate": "leave it out: log-probs are in `log_probs`, see `return_log_probs`",
    "output_scores": "leave it out: log-probs are in `log_probs`, see `return_log_probs`",
    "use_cache": "leave it out: servers always use their KV cache",
    "lora_request": 'with `transport="lora"` requests use the newest adapter; else `servers.pool.generate(lora=name)`',
}
"""Arguments of one generation."""

SCHEME_ARGUMENTS: Mapping[str, str] = {
    "server_url": "`servers`, the first argument: an engine, a pool or URLs",
    "engine": "`servers`, the first argument",
    "num_gpus": "leave it out: the scheme asks the servers for their ranks",
    "gpus_per_replica": "leave it out: the scheme asks the servers for their ranks",
    "num_replicas": "leave it out: the scheme updates all `servers`",
    "master_address": "`config=SyncConfig(master_address=...)`",
    "master_port": "`config=SyncConfig(master_port=...)`",
    "timeout": "`config=SyncConfig(fixed_timeout_s=...)`",
    "strategy": "leave it out: a module, a TensorDict and a dict of tensors are all taken",
    "flush_cache_on_update": '`config=SyncConfig(cache="flush")`, the default',
    "transport": '`config=SyncConfig(transport="broadcast")`',
    "pause": '`config=SyncConfig(pause="retract")`',
    "remote_addr": "`servers`, the first argument: an engine, a pool or URLs",
}
"""Arguments of weight sync schemes."""

POLICY_ARGUMENTS: Mapping[str, str] = {
    "vllm_engine": "`model`, the first argument: `AsyncSGLang.from_pretrained(...)` or `AsyncSGLang.connect(url)`",
    "from_text": '`input_mode="text"` or `"tokens"`',
    "return_tokens": "leave it out: `tokens` are always written",
}
"""Arguments of policies."""


def unknown_argument(
    name: str, known: Sequence[str], *, foreign: Mapping[str, str], elsewhere: Mapping[str, Sequence[str]] | None = None
) -> str:
    """The end of an error about an unknown argument: what to write instead.

    Args:
        name: the unknown argument.
        known: the valid names.
        foreign: the table for this kind of call.
        elsewhere: where an argument belongs, with ``{name}`` for its name, and the names that belong there.

    Returns:
        A sentence that begins with a blank; empty if nothing is known or near.

    Examples:
        >>> unknown_argument("enforce_eager", ["dtype"], foreign=ENGINE_ARGUMENTS)
        ' Use extra_args=("--disable-cuda-graph",); CPU servers use no CUDA graphs.'
        >>> unknown_argument("dtyp", ["dtype"], foreign=ENGINE_ARGUMENTS)
        " Did you mean 'dtype'?"
    """
    if name in foreign:
        hint = foreign[name].replace("`", "")
        says_what = hint.startswith(("leave it out", "does not exist", "on by default", "SGLang has", "with "))
        return f" {hint[0].upper()}{hint[1:]}." if says_what else f" Use {hint}."
    for place, names in (elsewhere or {}).items():
        if name in names:
            return f" It belongs into {place.format(name=name)}."
    return nearest_name(name, known)
