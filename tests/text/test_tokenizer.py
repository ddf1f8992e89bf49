"""Loading and caching the tokenizer of a model: the server's word first, then a few known rules."""

from __future__ import annotations

import base64
import json
import sys
import threading

import numpy as np
import pytest
import tokenizers

from tinkex import errors
from tinkex.text import tokenizer
from tinkex.text.tokenizer import LLAMA_3, tokenizer_id


@pytest.fixture(autouse=True)
def nothing_is_cached():
    tokenizer._cache.clear()
    yield
    tokenizer._cache.clear()


# Which one.


@pytest.mark.parametrize(
    "model, expected",
    [
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("gpt2", "gpt2"),
        ("meta-llama/Llama-3.1-8B", LLAMA_3),
        ("meta-llama/Llama-3.3-70B-Instruct", LLAMA_3),
        ("meta-llama/Llama-3.1-8B:peft:131072", LLAMA_3),
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"),
        ("org/model/variant", "org/model"),
        ("org/model/variant:peft:131072", "org/model"),
        ("Qwen/Qwen3-8B:peft:131072", "Qwen/Qwen3-8B"),
        ("a/b/c/d", "a/b/c/d"),
        ("a//b", "a//b"),
        ("moonshotai/Kimi-K2-Thinking", "moonshotai/Kimi-K2-Thinking"),
        ("tinkex/tiny", "tinkex/tiny"),
    ],
)
def test_statement_22_a_model_s_name_says_its_tokenizer(model, expected):
    """Llama 3 is gated on the hub; a third part is a variant; a suffix is a setting.
    (statement 22)"""
    assert expected == tokenizer_id(model)


@pytest.mark.parametrize(
    "told, expected",
    [
        ("some/tokenizer", "some/tokenizer"),
        ("some/tokenizer:suffix", "some/tokenizer"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("/models/mine:v2", "/models/mine:v2"),
    ],
)
def test_statement_22_the_server_s_word_beats_every_rule(told, expected):
    """It knows what it loaded; the rules only guess. (statement 22)"""
    assert expected == tokenizer_id("meta-llama/Llama-3.1-8B", told)


def test_a_model_in_a_directory_has_its_tokenizer_there(tmp_path):
    assert str(tmp_path) == tokenizer_id(str(tmp_path))


@pytest.mark.parametrize("name", [None, "", 5, b"gpt2"])
def test_a_name_that_is_none_is_refused(name):
    with pytest.raises(TypeError, match="model_name must be a non-empty str, got"):
        tokenizer_id(name)


# Loading.


def test_the_built_in_one_needs_no_network():
    built_in = tokenizer.load("tinkex/tiny")
    ids = built_in.encode("Grüße, 世界")

    assert "Grüße, 世界" == built_in.decode(ids)
    assert (256, 257) == (built_in.bos_token_id, built_in.eos_token_id)
    assert "<Tokenizer of 512 tokens>" == repr(built_in)


@pytest.fixture
def directory(tmp_path):
    """A model directory with a tokenizer of four words."""
    words = {"a": 0, "b": 1, "<s>": 2, "</s>": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 2)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def test_a_local_directory_is_a_tokenizer(directory):
    loaded = tokenizer.load(str(directory))

    assert [2, 0, 1] == loaded.encode("a b")
    assert [0, 1] == loaded.encode("a b", add_special_tokens=False)
    assert "<s> a b" == loaded.decode([2, 0, 1])
    assert "a b" == loaded.decode([2, 0, 1], skip_special_tokens=True)
    assert (2, 3) == (loaded.bos_token_id, loaded.eos_token_id)
    assert 4 == loaded.vocab_size


def test_token_ids_may_be_a_numpy_array(directory):
    assert "a b" == tokenizer.load(str(directory)).decode(np.array([0, 1]))


@pytest.mark.parametrize("ids", [[-1], [1.5], ["a"], [True], "ab", [None]])
def test_what_are_no_token_ids_is_refused(directory, ids):
    with pytest.raises(TypeError, match="ids must be a list of token ids"):
        tokenizer.load(str(directory)).decode(ids)


def test_text_must_be_text(directory):
    with pytest.raises(TypeError, match="text must be a str, got bytes"):
        tokenizer.load(str(directory)).encode(b"a")


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("tokenizer.json", None, "has no tokenizer.json; save the model's fast tokenizer there"),
        ("tokenizer.json", "{}", "is not a usable tokenizer"),
        ("tokenizer.json", "nonsense", "is not a usable tokenizer"),
        ("tokenizer_config.json", "nonsense", "tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", "[1]", "tokenizer_config.json holds a list"),
    ],
)
def test_a_directory_that_is_not_whole_says_what_is_missing(directory, name, content, words):
    if content is None:
        (directory / name).unlink()
    else:
        (directory / name).write_text(content)

    with pytest.raises(errors.TokenizerError, match=words):
        tokenizer.load(str(directory))


def test_the_hub_is_asked_by_its_own_library(directory, monkeypatch):
    """Which knows caches, tokens and gated models."""
    asked = []

    def download(identifier, name, revision=None):
        asked.append((identifier, name, revision))
        if not (directory / name).exists():
            raise OSError(f"404: {name}")
        return str(directory / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda address, timeout: None)

    assert [2, 0] == tokenizer.load("org/model", revision="abc").encode("a")
    assert ("org/model", "tokenizer.json", "abc") == asked[0]


def test_without_it_by_the_tokenizers_library(directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    asked = []

    class Hub:
        @staticmethod
        def from_pretrained(identifier, revision):
            asked.append((identifier, revision))
            return backend

    monkeypatch.setattr("tokenizers.Tokenizer", Hub)

    assert [2, 0] == tokenizer.load("org/model").encode("a")
    assert [("org/model", "main")] == asked


def test_a_tokenizer_that_cannot_be_loaded_says_why_and_what_to_do(monkeypatch):
    def refuse(address, timeout):
        raise OSError("401 Client Error: gated repo")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", refuse)

    with pytest.raises(errors.TokenizerError) as caught:
        tokenizer.load("org/gated")
    for words in ("org/gated", "gated repo", "HF_TOKEN", "load_fn=", "model directory"):
        assert words in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("path", ["./models/none", "../none", "/no/such/model", "~/none"])
def test_of_a_directory_that_is_not_there_the_hub_is_not_spoken_of(path):
    with pytest.raises(errors.TokenizerError, match=f"there is no model directory {path}"):
        tokenizer.load(path)


# Of one's own.


def test_load_fn_takes_our_place():
    mine = object()

    assert mine is tokenizer.load("org/model", load_fn=lambda identifier: mine)


def test_what_load_fn_raises_is_told_with_the_id():
    def load(identifier):
        raise OSError("no disk")

    with pytest.raises(errors.TokenizerError, match="could not load the tokenizer org/m: no disk"):
        tokenizer.load("org/m", load_fn=load)


# Caching.


def test_it_is_cached_by_id_revision_and_loader():
    """Theirs by the id alone: the first loader wins, whatever is asked for after."""
    calls = []

    def one(identifier):
        calls.append(identifier)
        return object()

    def other(identifier):
        return "other"

    assert tokenizer.load("a", load_fn=one) is tokenizer.load("a", load_fn=one)
    assert tokenizer.load("a", load_fn=one) is not tokenizer.load("a", revision="2", load_fn=one)
    assert tokenizer.load("a", load_fn=one) is not tokenizer.load("b", load_fn=one)
    assert "other" == tokenizer.load("a", load_fn=other)
    assert ["a", "a", "b"] == calls


def test_statement_22_it_is_loaded_once_however_many_want_it_at_once():
    """A tokenizer is megabytes, and may be a download. (statement 22)"""
    calls, meeting = [], threading.Barrier(8)

    def slow(identifier):
        calls.append(identifier)
        threading.Event().wait(0.02)
        return object()

    got = []

    def want():
        meeting.wait(10)
        got.append(tokenizer.load("a", load_fn=slow))

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)

    assert 1 == len(calls)
    assert 1 == len(set(map(id, got)))


def test_a_slow_one_does_not_hold_up_another():
    entered, release = threading.Event(), threading.Event()

    def slow(identifier):
        entered.set()
        assert release.wait(10)
        return "slow"

    thread = threading.Thread(target=tokenizer.load, args=("a",), kwargs={"load_fn": slow})
    thread.start()
    entered.wait(10)

    assert tokenizer.load("tinkex/tiny")
    release.set()
    thread.join(10)


def test_a_failure_is_not_cached():
    """The network may be back in a minute."""
    results = iter([OSError("offline"), "loaded"])

    def sometimes(identifier):
        result = next(results)
        if isinstance(result, Exception):
            raise result
        return result

    with pytest.raises(errors.TokenizerError):
        tokenizer.load("a", load_fn=sometimes)
    assert "loaded" == tokenizer.load("a", load_fn=sometimes)


# Conversations.

MESSAGES = [{"role": "user", "content": "Hi"}]


def test_a_chat_template_writes_a_conversation_as_the_model_knows_it():
    built_in = tokenizer.load("tinkex/tiny")

    assert "<|turn|>user\nHi<|end_turn|>" == built_in.apply_chat_template(MESSAGES)
    assert built_in.apply_chat_template(MESSAGES, add_generation_prompt=True).endswith(
        "<|turn|>assistant\n"
    )


@pytest.mark.parametrize("kept_in", ["config", "list", "file"])
def test_a_template_is_found_wherever_it_is_kept(directory, kept_in):
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    if kept_in == "config":
        settings["chat_template"] = template
    elif kept_in == "list":
        named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
        settings["chat_template"] = named
    else:
        (directory / "chat_template.jinja").write_text(template)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))

    assert "<s>Hi" == tokenizer.load(str(directory)).apply_chat_template(MESSAGES)


def test_a_model_without_a_template_says_so(directory):
    with pytest.raises(ValueError, match="has no chat template; write the conversation as text"):
        tokenizer.load(str(directory)).apply_chat_template(MESSAGES)


def test_what_a_template_refuses_is_told_in_its_words(directory):
    (directory / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")

    with pytest.raises(ValueError, match="does not accept these messages: roles must alternate"):
        tokenizer.load(str(directory)).apply_chat_template(MESSAGES)


def test_a_template_from_the_hub_cannot_run_what_it_likes(directory):
    """It is a program of strangers: it runs in a sandbox."""
    (directory / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")

    with pytest.raises(ValueError, match=r"does not accept these messages: .*unsafe"):
        tokenizer.load(str(directory)).apply_chat_template(MESSAGES)


# Kimi K2.


@pytest.fixture
def kimi_files(tmp_path, monkeypatch):
    """A tiktoken file of all bytes and one merge, and its settings."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    ranks = [bytes([i]) for i in range(256)] + [b"ab"]
    lines = [f"{base64.b64encode(word).decode()} {rank}" for rank, word in enumerate(ranks)]
    (tmp_path / "tiktoken.model").write_text("\n".join(lines))
    added = {"300": {"content": "[BOS]"}, "301": {"content": "[EOS]"}}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": added, "bos_token": "[BOS]", "eos_token": "[EOS]"})
    )
    return tmp_path


def test_kimi_k2_is_read_from_its_tiktoken_file(kimi_files, monkeypatch):
    """Pinned to a revision that is known to work."""
    asked = []

    def download(identifier, name, revision=None):
        asked.append((identifier, name, revision))
        return str(kimi_files / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda address, timeout: None)
    kimi = tokenizer.load("moonshotai/Kimi-K2-Thinking")
    ids = kimi.encode("ab你好[EOS]")

    assert [256, *"你好".encode(), 301] == ids
    assert "ab你好[EOS]" == kimi.decode(ids)
    assert "ab你好" == kimi.decode(ids, skip_special_tokens=True)
    assert (300, 301, 302) == (kimi.bos_token_id, kimi.eos_token_id, kimi.vocab_size)
    # Each token with the characters that it stands for; those of a part of one share it.
    [found] = kimi.encode_batch(["ab你好[EOS]"])
    same, offsets = found.ids, found.offsets
    assert ids == same
    assert "ab你好[EOS]"[offsets[-1][0] : offsets[-1][1]] == "[EOS]"
    assert [(0, 2), (2, 3), (2, 3), (2, 3)] == list(offsets)[:4]
    assert ["[BOS]", "[EOS]"] == sorted(kimi.control_tokens)
    assert {"612681931a8c906ddb349f8ad0f582cb552189cd"} == {revision for *_, revision in asked}


def test_kimi_k2_without_tiktoken_says_what_to_install(monkeypatch):
    find = tokenizer.importlib.util.find_spec
    monkeypatch.setattr(
        tokenizer.importlib.util,
        "find_spec",
        lambda name, *a: None if name == "tiktoken" else find(name, *a),
    )

    with pytest.raises(errors.MissingExtraError, match=r"pip install 'tinkex\[kimi\]'"):
        tokenizer.load("moonshotai/Kimi-K2-Thinking")
