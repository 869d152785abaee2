"""Generate responses to prompts.

Prompts are arguments of the command, or lines of standard input. Responses go to standard output in the same order;
with -n above 1 a line above each says which it is. With --chat each prompt is a user's message and goes through the
model's chat template.

    torchrl-sglang generate --model SmolLM2 --chat "What is the capital of France?"
    torchrl-sglang generate "The capital of France is" --max-new-tokens 8
    torchrl-sglang generate --chat "What is 2 + 2?" --temperature 0
    torchrl-sglang generate --json < prompts.txt > responses.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from torchrl_sglang.cli.target import add_generation_options, add_target_options, generation_settings, target
from torchrl_sglang.config import ClientConfig
from torchrl_sglang.errors import ConfigError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="text; if there is none, lines of standard input")
    parser.add_argument("--chat", action="store_true", help="put each prompt through the chat template")
    parser.add_argument("-n", type=int, default=1, help="responses per prompt (default: 1)")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object per response: prompt, text, lengths, reason"
    )
    add_target_options(parser)
    add_generation_options(parser)


def run(args: argparse.Namespace) -> int:
    """Generate and print."""
    prompts = args.prompts or _lines()
    settings = {**generation_settings(args), "num_return_sequences": args.n}
    with target(args) as (url, config):
        rows = _answer(url, config, prompts, args.adapter, settings) if args.chat else None
        rows = rows if rows is not None else _continue(url, config, prompts, args.adapter, settings)
    for number, row in enumerate(rows):
        if args.n > 1 and not args.json:
            print(_heading(number, args.n, prompts))
        print(json.dumps(row, ensure_ascii=False) if args.json else row["text"])
    return 0


def _heading(number: int, per_prompt: int, prompts: list[str]) -> str:
    """The line above one of several responses to a prompt.

    Examples:
        >>> _heading(3, 2, ["one", "two"])
        '--- prompt 2 of 2, response 2 of 2 ---'
    """
    which = f"prompt {number // per_prompt + 1} of {len(prompts)}, " if len(prompts) > 1 else ""
    return f"--- {which}response {number % per_prompt + 1} of {per_prompt} ---"


def _lines() -> list[str]:
    if sys.stdin.isatty():
        raise ConfigError(
            'no prompt: give one as an argument (torchrl-sglang generate "..."), or lines on standard input'
        )
    lines = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not lines:
        raise ConfigError("no prompt: standard input is empty")
    return lines


def _answer(
    url: str, config: ClientConfig, prompts: list[str], adapter: str | None, settings: dict[str, Any]
) -> list[dict[str, Any]]:
    from torchrl_sglang.chat import SGLangChat

    chat = SGLangChat(url, adapter=adapter, client=config)
    return [
        _row(prompt, answer.text, answer.prompt_length, answer.response_length, answer.finish_reason)
        for prompt in prompts
        for answer in chat.chat(prompt, **settings)
    ]


def _continue(
    url: str, config: ClientConfig, prompts: list[str], adapter: str | None, settings: dict[str, Any]
) -> list[dict[str, Any]]:
    from torchrl_sglang.client import SGLangClient
    from torchrl_sglang.config import SamplingParams
    from torchrl_sglang.model_files import load_tokenizer
    from torchrl_sglang.pool import SGLangPool
    from torchrl_sglang.text_tokens import encode_texts

    pool = SGLangPool([SGLangClient(url, config)])
    pool.connect()
    tokenizer = load_tokenizer(pool.info.tokenizer_path, pool.info.revision)
    sampling = SamplingParams.from_kwargs(**settings)
    ids_B_T = encode_texts(tokenizer, prompts, open_end=True)
    replies = pool.generate(ids_B_T, sampling, return_logprobs=False, lora=adapter)
    return [
        _row(prompts[i // sampling.n], r.text, r.prompt_tokens, r.completion_tokens, r.finish_reason)
        for i, r in enumerate(replies)
    ]


def _row(prompt: str, text: str, prompt_length: int, response_length: int, reason: str) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "text": text,
        "prompt_length": prompt_length,
        "response_length": response_length,
        "finish_reason": reason,
    }
