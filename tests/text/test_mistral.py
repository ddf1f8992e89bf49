"""Mistral's own encoder and vocabularies (mistral-common) as the reference for its templates.

The templates are those of Hugging Face; mistral-common has none, it puts tokens together in code.
Both describe the same models, so what we make of a template must be what Mistral trained on.
"""

from __future__ import annotations

import json
from functools import lru_cache

import pytest
from mistral_common.protocol.instruct import messages as mistral_messages
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from sentencepiece import SentencePieceProcessor

import tinkex
from tests.support import mistral_vocabularies as vocabularies
from tests.text.conftest import SENTENCEPIECE as SPECIAL
from tests.text.conftest import TEMPLATES
from tinkex.text.renderer import render_completion, render_text
from tinkex.text.tokenizer import Tokenizer

#: Template -> the version of its models' vocabulary of byte pairs.
TEKKEN = {"mistral_nemo": "v3", "mistral_small_3": "v7"}
SENTENCEPIECE = ("mistral_v02", "mistral_v03", "mistral_large_2411")
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


def vocabulary_of(kind):
    return vocabularies.file(vocabularies.SENTENCEPIECE[kind])


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The tokens that Mistral's encoder makes of a kind's messages."""

    @lru_cache
    def encoder(kind, mode):
        if kind in SENTENCEPIECE:
            return MistralTokenizer.from_file(vocabulary_of(kind), mode)
        held = json.loads(vocabularies.file(vocabularies.TEKKEN).read_text(encoding="utf-8"))
        size = vocabularies.TEKKEN_SIZE
        held["config"] |= {"version": TEKKEN[kind], "default_vocab_size": size}
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


def ours(kind):
    template = (TEMPLATES / f"{kind}.jinja").read_text(encoding="utf-8")
    if kind in SENTENCEPIECE:
        backend = vocabularies.sentencepiece(vocabularies.SENTENCEPIECE[kind])
    else:
        backend = vocabularies.tekken()
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
    processor = SentencePieceProcessor(model_file=str(vocabulary_of(kind)))

    expected = [*processor.encode(text), processor.eos_id()]

    assert expected == render_text(text, ours(kind)).tokens.tolist()


@pytest.mark.parametrize("kind", SENTENCEPIECE)
@pytest.mark.parametrize("completion", ["Paris", " Paris", "\nParis"])
def test_of_a_completion_sentencepiece_sees_one_text(kind, completion):
    """No space between: the prompt's last token may even reach into the completion."""
    processor = SentencePieceProcessor(model_file=str(vocabulary_of(kind)))

    rendered = render_completion("The capital of France:", completion, ours(kind))

    expected = processor.encode(f"The capital of France:{completion}")
    assert [*expected, processor.eos_id()] == rendered.tokens.tolist()
