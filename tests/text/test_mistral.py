"""Mistral's own encoder and vocabularies (mistral-common) as the reference for its templates.

The templates are those of Hugging Face; mistral-common has none, it puts tokens together in code.
Both describe the same models, so what we make of a template must be what Mistral trained on.
"""

from __future__ import annotations

import base64
import json
from functools import lru_cache
from pathlib import Path

import mistral_common
import pytest
import tokenizers
from mistral_common.protocol.instruct import messages as mistral_messages
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from sentencepiece import SentencePieceProcessor
from tokenizers import decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import SentencePieceExtractor, bytes_to_unicode
from transformers.tokenization_utils_base import generate_merges

import tinkex
from tests.text.conftest import SENTENCEPIECE as SPECIAL
from tests.text.conftest import TEMPLATES
from tinkex.text.renderer import render_completion, render_text
from tinkex.text.tokenizer import Tokenizer

DATA = Path(mistral_common.__file__).parent / "data"
#: Template -> the vocabulary of its models, in SentencePiece.
SENTENCEPIECE = {
    "mistral_v02": "tokenizer.model.v1",
    "mistral_v03": "mistral_instruct_tokenizer_240323.model.v3",
    "mistral_large_2411": "mistral_instruct_tokenizer_241114.model.v7",
}
#: Template -> the version of its models' vocabulary of byte pairs.
TEKKEN = {"mistral_nemo": "v3", "mistral_small_3": "v7"}
#: Ids below this are special tokens there; the first byte pairs of 131,072 are enough here.
TEKKEN_SPECIAL, TEKKEN_SIZE = 1000, 33_000
CLASSES = {
    "system": mistral_messages.SystemMessage,
    "user": mistral_messages.UserMessage,
    "assistant": mistral_messages.AssistantMessage,
}
#: Those that show a system message although an answer follows.
WITH_SYSTEM = ("mistral_v02", "mistral_large_2411", "mistral_small_3")

SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "What is the capital of France?"}
SAY = {"role": "assistant", "content": "The capital of France is Paris."}
AGAIN = {"role": "user", "content": "  What is the weather in Berlin?\n\nAnd – 21° – 晴れ ☀️?"}
SUNNY = {"role": "assistant", "content": "It is sunny: 21°, 晴れ ☀️.\n\n  1. def f(x):\n\treturn x"}
TURNS = [ASK, SAY, AGAIN, SUNNY]

every_kind = pytest.mark.parametrize("kind", [*SENTENCEPIECE, *TEKKEN])


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The tokens that Mistral's encoder makes of a kind's messages."""

    @lru_cache
    def encoder(kind, mode):
        if kind in SENTENCEPIECE:
            return MistralTokenizer.from_file(DATA / SENTENCEPIECE[kind], mode)
        held = json.loads((DATA / "tekken_240718.json").read_text(encoding="utf-8"))
        held["config"] |= {"version": TEKKEN[kind], "default_vocab_size": TEKKEN_SIZE}
        held["special_tokens"] = list(Tekkenizer.DEPRECATED_SPECIAL_TOKENS)
        path = tmp_path_factory.mktemp(kind) / "tekken.json"
        path.write_text(json.dumps(held), encoding="utf-8")
        return MistralTokenizer.from_file(path, mode)

    def theirs(kind, messages):
        is_answered = messages[-1]["role"] == "assistant"
        mode = ValidationMode.finetuning if is_answered else ValidationMode.test
        said = [CLASSES[m["role"]](content=m["content"]) for m in messages]
        request = ChatCompletionRequest(messages=said)
        return encoder(kind, mode).encode_chat_completion(request).tokens

    return theirs


@lru_cache
def sentencepiece(file):
    """The vocabulary as Hugging Face has it: only the beginning of a text gets a space."""
    extractor = SentencePieceExtractor(str(DATA / file))
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
def tekken():
    """The vocabulary of byte pairs, after the special tokens."""
    held = json.loads((DATA / "tekken_240718.json").read_text(encoding="utf-8"))
    letters = bytes_to_unicode()
    vocabulary = {}
    for entry in held["vocab"][: TEKKEN_SIZE - TEKKEN_SPECIAL]:
        text = "".join(letters[byte] for byte in base64.b64decode(entry["token_bytes"]))
        vocabulary[text] = entry["rank"] + TEKKEN_SPECIAL
    merges = generate_merges(vocabulary)
    special = [str(entry["token_str"].value) for entry in Tekkenizer.DEPRECATED_SPECIAL_TOKENS]
    vocabulary |= {text: number for number, text in enumerate(special)}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    pattern = tokenizers.Regex(held["config"]["pattern"])
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(special)
    return made


def ours(kind):
    template = (TEMPLATES / f"{kind}.jinja").read_text(encoding="utf-8")
    backend = sentencepiece(SENTENCEPIECE[kind]) if kind in SENTENCEPIECE else tekken()
    return Tokenizer(backend, {**SPECIAL, "chat_template": template})


@every_kind
@pytest.mark.parametrize("turns", [2, 4])
def test_tokens_are_those_of_mistral(theirs, kind, turns):
    messages = [*[SYSTEM] * (kind in WITH_SYSTEM), *TURNS[:turns]]

    assert theirs(kind, messages) == tinkex.render(messages, ours(kind)).tokens.tolist()


@every_kind
def test_a_prompt_is_that_of_mistral(theirs, kind):
    messages = [SYSTEM, *TURNS[:3]]

    assert theirs(kind, messages) == tinkex.render_prompt(messages, ours(kind)).tokens


@every_kind
def test_what_counts_is_what_mistral_adds_to_the_prompt(theirs, kind):
    """The answer and what ends it: what its encoder writes after what one samples from."""
    messages = [*[SYSTEM] * (kind == "mistral_small_3"), *TURNS]
    expected: list[int] = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = len(theirs(kind, messages[:i])), len(theirs(kind, messages[: i + 1]))
            expected += [0] * (before - len(expected)) + [1] * (after - before)

    assert expected == tinkex.render(messages, ours(kind)).weights.tolist()


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_a_text_is_that_of_sentencepiece(kind):
    text = "The capital of France,  it says:\n\tParis – 晴れ."
    processor = SentencePieceProcessor(model_file=str(DATA / SENTENCEPIECE[kind]))

    expected = [*processor.encode(text), processor.eos_id()]

    assert expected == render_text(text, ours(kind)).tokens.tolist()


@pytest.mark.parametrize("kind", SENTENCEPIECE)
@pytest.mark.parametrize("completion", ["Paris", " Paris", "\nParis"])
def test_of_a_completion_sentencepiece_sees_one_text(kind, completion):
    """No space between: the prompt's last token may even reach into the completion."""
    processor = SentencePieceProcessor(model_file=str(DATA / SENTENCEPIECE[kind]))

    rendered = render_completion("The capital of France:", completion, ours(kind))

    expected = processor.encode(f"The capital of France:{completion}")
    assert [*expected, processor.eos_id()] == rendered.tokens.tolist()
