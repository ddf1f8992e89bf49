"""Vocabularies of Mistral's models, from the package mistral-common, in Hugging Face's form."""

from __future__ import annotations

import base64
import importlib.util
import json
from functools import lru_cache
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import SentencePieceExtractor, bytes_to_unicode
from transformers.tokenization_utils_base import generate_merges

#: Template -> the vocabulary of its models, in SentencePiece. Llama 2's is much like the first.
SENTENCEPIECE = {
    "mistral_v01": "tokenizer.model.v1",
    "mistral_v02": "tokenizer.model.v1",
    "mistral_v03": "mistral_instruct_tokenizer_240323.model.v3",
    "mistral_large_2411": "mistral_instruct_tokenizer_241114.model.v7",
    "zephyr": "tokenizer.model.v1",
    "llama2": "tokenizer.model.v1",
}
TEKKEN = "tekken_240718.json"
#: Ids below this are special tokens in the vocabulary of byte pairs; the first pairs of 131,072 are
#: enough for tests.
TEKKEN_SPECIAL, TEKKEN_SIZE = 1000, 33_000
TEKKEN_CONTROL = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]",
    "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
)  # fmt: skip


def file(name: str) -> Path:
    """A file of the package; skips the test if it is not installed."""
    package = importlib.util.find_spec("mistral_common")
    if package is None or package.origin is None:
        pytest.skip("mistral-common is not installed")
    return Path(package.origin).parent / "data" / name


@lru_cache
def sentencepiece(name: str) -> tokenizers.Tokenizer:
    """Only the beginning of a text gets a space, not what follows a control token."""
    extractor = SentencePieceExtractor(str(file(name)))
    found = extractor.extract(models.BPE)
    merges = generate_merges(found["vocab"], {p.piece: p.score for p in extractor.proto.pieces})
    made = tokenizers.Tokenizer(
        models.BPE(found["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(found["additional_special_tokens"])
    return made


@lru_cache
def tekken() -> tokenizers.Tokenizer:
    """The byte pairs, after the special tokens."""
    held = json.loads(file(TEKKEN).read_text(encoding="utf-8"))
    letters = bytes_to_unicode()
    vocabulary = {}
    for entry in held["vocab"][: TEKKEN_SIZE - TEKKEN_SPECIAL]:
        text = "".join(letters[byte] for byte in base64.b64decode(entry["token_bytes"]))
        vocabulary[text] = entry["rank"] + TEKKEN_SPECIAL
    merges = generate_merges(vocabulary)
    vocabulary |= {text: number for number, text in enumerate(TEKKEN_CONTROL)}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    pattern = tokenizers.Regex(held["config"]["pattern"])
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(TEKKEN_CONTROL))
    return made
