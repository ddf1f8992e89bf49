"""Hostile and damaged model directories: refused in a moment, before memory is taken."""

from __future__ import annotations

import json
import os
import resource
import struct
import time
from pathlib import Path

import pytest
import torch

from tests.support import hf_reference as hf
from tinkex.engine import loading, model_files
from tinkex.text import gguf

CPU = torch.device("cpu")
#: Address space that a hostile model may make loading take, beside what is taken already.
ROOM = 2 * 2**30


@pytest.fixture
def base(tmp_path):
    return hf.make_base(tmp_path / "base")


@pytest.fixture(scope="module", autouse=True)
def transformers_is_imported(tmp_path_factory):
    """So that its seconds do not count."""
    loading.load(str(hf.make_base(tmp_path_factory.mktemp("warm") / "base")), CPU)


def refusal(directory):
    """The message; loading has neither memory nor time for what the directory claims."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    started = time.monotonic()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    try:
        with pytest.raises(ValueError) as caught:
            loading.load(str(directory), CPU)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.monotonic() - started < 20
    return str(caught.value)


def configure(directory, **settings):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize("field", model_files.MOST)
@pytest.mark.parametrize("value", [2**40, -1, 0, 1.5, "many", [4], True, 2**70])
def test_sizes_that_no_model_has_are_refused_by_name(base, field, value):
    configure(base, **{field: value})

    assert f"{field} = " in refusal(base)


def test_the_largest_allowed_sizes_are_compared_with_the_files_before_memory_is_taken(base):
    """A model within every bound, but of 10,000 times the memory there is."""
    configure(base, hidden_size=2**17, intermediate_size=2**20, num_hidden_layers=16)

    assert "instead of" in refusal(base)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", 7]
)
def test_an_index_that_points_elsewhere_is_refused(base, tmp_path, name):
    (tmp_path / "secret.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    index = {"weight_map": {"model.norm.weight": name}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))

    assert "which is not in the same directory" in refusal(base)


@pytest.mark.parametrize("size", [2**60, 2**63 - 1, 2**64 - 1, 2**40, 50 * 2**20])
def test_a_header_longer_than_the_file_is_refused(base, size):
    path = base / "model.safetensors"
    path.write_bytes(struct.pack("<Q", size) + path.read_bytes()[8:])

    assert f"its header claims {size:,} bytes" in refusal(base)


def test_a_header_larger_than_any_model_needs_is_refused(base):
    """The file is as large as it says."""
    with (base / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 2**30))
        file.truncate(2**30 + 8)

    assert "its header claims 1,073,741,824 bytes" in refusal(base)


def test_tensors_that_lie_beyond_the_file_are_refused(base):
    path = base / "model.safetensors"
    header = {"model.norm.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)

    assert "cannot be read" in refusal(base)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"7", b"null", b"[" * 200_000, b"\xff\xfe", b'{"model_type": "llama"' * 9],
)
def test_a_config_that_is_no_object_is_refused(base, content):
    (base / "config.json").write_bytes(content)

    assert "config.json" in refusal(base)


def test_a_config_of_a_gigabyte_is_not_read(base):
    with (base / "config.json").open("wb") as file:
        file.truncate(2**30)

    assert "at most 33,554,432 are read" in refusal(base)


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_parameters": {"rope_type": "yarn", "factor": "x"}},
        {"rope_parameters": 7},
        {"hidden_size": 33},
        {"num_attention_heads": 5},
        {"model_type": {"a": 1}},
        {"model_type": "no-such"},
        {"torch_dtype": "nonsense"},
        {"vocab_size": 1},
        {"rms_norm_eps": "small"},
        {"architectures": 3},
    ],
)
def test_odd_settings_are_a_sentence_or_load(base, settings):
    """Whatever transformers raises for them."""
    configure(base, **settings)
    try:
        loading.load(str(base), CPU)
    except ValueError as exc:
        assert str(base) in str(exc)


def test_what_is_no_regular_file_is_not_opened(base):
    """Opening a pipe would wait for a writer for ever."""
    (base / "model.safetensors").unlink()
    os.mkfifo(base / "model.safetensors")
    os.mkfifo(base / "extra.json")

    assert "lacks" in refusal(base)


def test_a_list_without_end_in_a_gguf_header_is_refused(tmp_path):
    key = b"tokenizer.ggml.tokens"
    text = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key
    for count in (2**25, 2**60):
        for element in (4, 8, 9):
            path = tmp_path / f"{count}-{element}.gguf"
            path.write_bytes(text + struct.pack("<IIQ", 9, element, count))
            with pytest.raises(gguf.GgufError, match="elements in its header"):
                gguf.read(path)


def test_lists_in_lists_in_a_gguf_header_are_refused(tmp_path):
    path = tmp_path / "deep.gguf"
    key = b"x"
    text = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key
    path.write_bytes(text + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 100_000)
    with pytest.raises(gguf.GgufError):
        gguf.read(path)


def test_loading_tells_how_far_it_is_and_can_be_stopped(base):
    """What the progress function raises ends the reading."""
    seen = []
    loading.load(str(base), CPU, on_progress=lambda done, total: seen.append((done, total)))
    [total] = {total for _, total in seen[1:]}

    def stop(done, total):
        if done > total / 2:
            raise RuntimeError("stopped")

    assert sorted(seen) == seen
    assert (total, total) == seen[-1]
    with pytest.raises(RuntimeError, match="stopped"):
        loading.load(str(base), CPU, on_progress=stop)
