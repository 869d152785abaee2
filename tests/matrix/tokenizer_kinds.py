"""Small tokenizers of every kind that the families use, trained on one text when they are first needed.

The vocabularies differ in size, none is a multiple of 64, and ids of special tokens are not always the first ones.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import tokenizers
import transformers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

__all__ = ["TOKENIZERS", "make_tokenizer"]

TEXT = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. What is the capital of France? "
    "The capital of France is Paris. You are a helpful assistant. Answer with only the number: 2 + 3 = 5. Hello world! "
    'How are you today? I am fine, thank you. {"name": "add", "arguments": {"a": 1, "b": 2}} user assistant system '
    "model tool 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20. Think first, then answer in one short sentence."
)
CHATML = ("<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>")
MISTRAL = ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]")
GEMMA = ("<start_of_turn>", "<end_of_turn>")
THINKING = ("<think>", "</think>", "<tool_call>", "</tool_call>")
ROLE_TOKENS = (*CHATML, *LLAMA3, *MISTRAL, *GEMMA)
"""Special tokens of the templates; every tokenizer has them, so that any template can be used with it."""


def _byte_level() -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    return core


def _sentencepiece(core: tokenizers.Tokenizer, trainer: Any, *, prefix_space: bool) -> tokenizers.Tokenizer:
    """As converted from SentencePiece: spaces become ``▁``, and unknown characters become bytes.

    With ``prefix_space`` every piece of text between two special tokens gets a space in front, as in Llama 2's
    tokenizer, and decoding removes the first one only.
    """
    steps = [normalizers.Replace(" ", "▁")]
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps] if prefix_space else steps)
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix_space else []),
        ]
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")  # for the training only
    core.train_from_iterator([TEXT], trainer)
    if isinstance(core.model, models.BPE):
        core.pre_tokenizer = None
    return core


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _sentencepiece_bpe() -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    special = ["<unk>", "<s>", "</s>", *BYTES]
    return _sentencepiece(
        core, trainers.BpeTrainer(vocab_size=410, special_tokens=special, show_progress=False), prefix_space=True
    )


def _sentencepiece_unigram() -> tokenizers.Tokenizer:
    """Without a prefix space, as Gemma's."""
    core = tokenizers.Tokenizer(models.Unigram())
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=[], show_progress=False)
    core = _sentencepiece(core, trainer, prefix_space=False)
    pieces = [(piece, score) for piece, score in _pieces(core)]
    special = [("<pad>", 0.0), ("<eos>", 0.0), ("<bos>", 0.0), ("<unk>", 0.0), *((byte, -20.0) for byte in BYTES)]
    core.model = models.Unigram([*special, *pieces], unk_id=3, byte_fallback=True)
    return core


def _pieces(core: tokenizers.Tokenizer) -> list[tuple[str, float]]:
    return [tuple(pair) for pair in json.loads(core.to_str())["model"]["vocab"]]


def _word_piece() -> tokenizers.Tokenizer:
    """Lower-cases and splits words, so decoding does not return the text."""
    core = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(prefix="##")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    core.train_from_iterator(
        [TEXT, " ".join(chr(c) for c in range(33, 127))],
        trainers.WordPieceTrainer(vocab_size=260, special_tokens=special, show_progress=False),
    )
    return core


def _wrap(
    core: tokenizers.Tokenizer,
    *,
    special: Sequence[str] = (),
    plain: Sequence[str] = (),
    adds_bos: bool = False,
    **named: Any,
) -> Any:
    """A Hugging Face tokenizer. ``plain`` tokens are added, but stay in decoded text, as ``<think>`` does."""
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in named.values()])
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    if adds_bos:
        bos = named["bos_token"]
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, core.token_to_id(bos))]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **named)


def _qwen_like() -> Any:
    return _wrap(_byte_level(), pad_token="<|endoftext|>", eos_token="<|im_end|>", special=ROLE_TOKENS, plain=THINKING)


def _llama3_like() -> Any:
    """Adds BOS, which the chat templates also write; has no pad token."""
    return _wrap(
        _byte_level(), bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>", special=ROLE_TOKENS, adds_bos=True
    )


def _gpt2_like() -> Any:
    """One token is BOS, EOS and unknown; there is no pad token."""
    end = "<|endoftext|>"
    return _wrap(_byte_level(), bos_token=end, eos_token=end, unk_token=end, special=ROLE_TOKENS)


def _llama2_like() -> Any:
    return _wrap(
        _sentencepiece_bpe(), bos_token="<s>", eos_token="</s>", unk_token="<unk>", special=ROLE_TOKENS, adds_bos=True
    )


def _gemma_like() -> Any:
    return _wrap(
        _sentencepiece_unigram(),
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        special=ROLE_TOKENS,
        adds_bos=True,
    )


def _word_piece_like() -> Any:
    return _wrap(
        _word_piece(), pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", eos_token="[SEP]", special=ROLE_TOKENS
    )


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "byte-level BPE": _qwen_like,
    "byte-level BPE that adds BOS": _llama3_like,
    "byte-level BPE with one special token": _gpt2_like,
    "SentencePiece BPE with prefix space": _llama2_like,
    "SentencePiece Unigram": _gemma_like,
    "WordPiece": _word_piece_like,
}


@cache
def _trained(kind: str) -> Any:
    return TOKENIZERS[kind]()


def make_tokenizer(kind: str, template: str | None = None) -> Any:
    """A new tokenizer of this kind with a chat template."""
    made = copy.deepcopy(_trained(kind))
    made.chat_template = template
    return made
