"""Tokenizers of the kinds that models have, made in memory: byte-level BPE, SentencePiece and WordPiece.

Each has every character of ASCII, so that all texts of the tests have tokens, and a vocabulary below 600 ids.
"""

from __future__ import annotations

import json
from typing import Any, Literal

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

Kind = Literal["byte-level", "sentencepiece", "unigram", "wordpiece"]
KINDS: tuple[Kind, ...] = ("byte-level", "sentencepiece", "unigram", "wordpiece")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Without ``generation`` tags."""

INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
"""In the manner of Llama 2: BOS in the text, the answer trimmed and set between spaces, no special tokens around it."""

THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""In the manner of Qwen 3: earlier answers lose their thinking."""

TOOLS = (
    "{% if tools %}Tools: {{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if 'tool_calls' in m %}{% for c in m.tool_calls %}"
    "{% if c.id is not defined or c.id | length != 9 %}{{ raise_exception('ids of nine letters, please') }}{% endif %}"
    "<tool_call>{{ c.function.name }} {{ c.function.arguments | tojson }} {{ c.id }}</tool_call>{% endfor %}"
    "{% elif m.role == 'tool' %}{{ m.tool_call_id }}: {{ m.content }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""In the manner of Mistral: calls need ids of nine characters, and results name them."""

_TEXTS = [
    "What is the capital of France? The capital of France is Paris. What is 2 + 3? Answer with only the number.",
    "The quick brown fox jumps over the lazy dog. You are a helpful assistant. Hello world! user system [INST] tool",
] * 3
_ASCII = "".join(map(chr, range(32, 127))) + "\n"
_CHATML = ["<|im_start|>", "<|im_end|>"]


def make_tokenizer(
    kind: Kind,
    *,
    chat_template: str | dict[str, str] | None = CHATML,
    bos: bool = True,
    eos_added: bool = False,
    pad: str | None = "<pad>",
    prefix_space: Literal["first", "always", "never"] = "first",
    more_tokens: tuple[tokenizers.AddedToken, ...] = (),
) -> Any:
    """A fast tokenizer.

    Args:
        kind: what it is like.
        chat_template: its chat template.
        bos: it puts BOS before a text (``[CLS]`` for WordPiece, which also puts ``[SEP]`` behind).
        eos_added: it puts EOS behind a text.
        pad: its padding token.
        prefix_space: when SentencePiece puts a space before a text.
        more_tokens: added after training.
    """
    first, last = ("[CLS]", "[SEP]") if kind == "wordpiece" else ("<s>", "</s>")
    special = ["<unk>", first, last, *([pad] if pad else []), *_CHATML]
    core = {
        "byte-level": _byte_level,
        "sentencepiece": _sentencepiece,
        "unigram": _unigram,
        "wordpiece": _wordpiece,
    }[kind](special, prefix_space)
    parts = [*([first] if bos else []), "$A", *([last] if eos_added or kind == "wordpiece" else [])]
    if len(parts) > 1:
        core.post_processor = processors.TemplateProcessing(
            single=" ".join(parts), special_tokens=[(t, core.token_to_id(t)) for t in (first, last)]
        )
    roles = {"cls_token": first, "sep_token": last} if kind == "wordpiece" else {"bos_token": first, "eos_token": last}
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token=pad, clean_up_tokenization_spaces=False, **roles
    )
    made.chat_template = chat_template
    if more_tokens:
        made.add_tokens(list(more_tokens))
    return made


def _byte_level(special: list[str], _: str) -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        _TEXTS,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return core


def _metaspace(core: tokenizers.Tokenizer, prefix_space: str) -> None:
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix_space, split=True)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )


def _sentencepiece(special: list[str], prefix_space: str) -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    _metaspace(core, prefix_space)
    of_bytes = [f"<0x{i:02X}>" for i in range(256)]
    core.train_from_iterator(
        [*_TEXTS, _ASCII],
        trainers.BpeTrainer(vocab_size=560, special_tokens=[*special, *of_bytes], show_progress=False),
    )
    # The trainer takes them as special tokens only, but a model's are ordinary ones.
    content = json.loads(core.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in of_bytes]
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def _unigram(special: list[str], prefix_space: str) -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(models.Unigram())
    _metaspace(core, prefix_space)
    core.train_from_iterator(
        [*_TEXTS, _ASCII],
        trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    return core


def _wordpiece(special: list[str], _: str) -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(cleanup=False)
    core.train_from_iterator(
        [*_TEXTS, " ".join(_ASCII)],
        trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False),
    )
    return core
