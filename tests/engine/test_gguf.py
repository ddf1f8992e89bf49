"""GGUF files as base models: against transformers' own reading, and what is refused."""

from __future__ import annotations

import errno
import json
import resource
from pathlib import Path

import attrs
import gguf
import numpy as np
import pytest
import torch
import transformers

from tests.support import hf_reference as hf
from tests.support.frozen_linears import FrozenLinears
from tinkex import types
from tinkex.engine import gguf as reading
from tinkex.engine import gguf_writer, loading
from tinkex.engine.attention import Packing
from tinkex.engine.engine import Engine
from tinkex.engine.model import Training
from tinkex.text import gguf as header
from tinkex.text import tokenizer

CPU = torch.device("cpu")


def logits(name, tokens):
    base = loading.load(str(name), CPU).base
    packing = Packing([len(tokens)], base.device)
    with torch.no_grad():
        hidden = Training(base, FrozenLinears(base), packing).forward(tokens, save=False)
        return FrozenLinears(base).forward("head", hidden)


def make_gguf(folder, kind="llama", stored="F32"):
    """A small model in *folder* and its GGUF file."""
    base = hf.make_base(folder / "base", kind)
    path = folder / "model.gguf"
    gguf_writer.write(base, path, stored)
    return base, path


@pytest.mark.parametrize(
    "kind",
    ["llama", "llama-tied-biased", "llama3-rope", "mistral", "qwen2", "qwen3", "gemma3-of-gguf"],
)
def test_each_family_is_computed_as_transformers_computes_the_directory(kind, tmp_path):
    """Names, order of rows, biases, head norms, rotary factors: all survive."""
    base, path = make_gguf(tmp_path, kind)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, hf.VOCAB, 60))
    with torch.no_grad():
        expected = hf.load_base(base)(input_ids=tokens[None]).logits[0]

    torch.testing.assert_close(logits(path, tokens), expected, atol=1e-4, rtol=1e-4)


#: What transformers does not read from a file, by the kind of model.
TOLD = {
    "qwen3": {"head_dim": 16},
    "gemma3-of-gguf": {
        "query_pre_attn_scalar": 16,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
}

#: The same for the sizes of `wide`.
SIZES_TOLD = {"qwen3": {"head_dim": 64}, "gemma3-of-gguf": {"query_pre_attn_scalar": 64}}


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma3-of-gguf"])
def test_each_family_is_read_as_transformers_reads_the_file(kind, tmp_path):
    """transformers has a reader of its own, so a mistake in our writer cannot hide one in it."""
    _, path = make_gguf(tmp_path, kind)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, hf.VOCAB, 60))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, **TOLD.get(kind, {})
    )
    with torch.no_grad():
        expected = theirs.eval()(input_ids=tokens[None]).logits[0]

    torch.testing.assert_close(logits(path, tokens), expected, atol=1e-3, rtol=1e-3)


def write_quantized(path, kind):
    """A file with one matrix of random blocks; what the `gguf` package makes of it."""
    number = gguf.GGMLQuantizationType[kind]
    per_block, size = gguf.GGML_QUANT_SIZES[number]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (6, 512 // per_block * size), dtype=np.uint8)
    if kind in ("F32", "F16", "BF16"):
        values = rng.normal(size=(6, 512)).astype(np.float32)
        raw = {
            "F32": lambda: values.view(np.uint8),
            "F16": lambda: values.astype(np.float16).view(np.uint8),
            "BF16": lambda: gguf.quantize(values, number),
        }[kind]()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("output.weight", np.ascontiguousarray(raw), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf.dequantize(raw.reshape(6, -1), number) if kind[0] in "QB" else None


KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K"]

#: Where the scales of a block are that decide how large its numbers can be.
SCALES = {"Q4_K": slice(0, 4), "Q5_K": slice(0, 4), "Q6_K": slice(208, 210)}


def stored(values, kind):
    """A matrix in the bytes of *kind*. No library here writes K types: those are of random blocks
    with small scales."""
    number = gguf.GGMLQuantizationType[kind]
    if kind not in SCALES:
        return gguf.quantize(values, number)
    size = gguf.GGML_QUANT_SIZES[number][1]
    raw = np.random.default_rng(values.size).integers(
        0, 256, (len(values), values.shape[1] // 256, size), dtype=np.uint8
    )
    scales = raw[..., SCALES[kind]]
    scales[:] = np.full(scales.shape[-1] // 2, 3e-4, np.float16).view(np.uint8)
    return raw.reshape(len(values), -1)


def quantize(source, path, kind):
    """Write the file *source* of F32 again, its matrices as *kind*."""
    read = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, read.fields["general.architecture"].contents())
    for name, field in read.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub_type = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    for tensor in read.tensors:
        if tensor.data.ndim == 1:
            writer.add_tensor(tensor.name, tensor.data)
        else:
            number = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(tensor.name, stored(tensor.data, kind), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Makes a file of a family in F32, wide enough for blocks of K types; once each."""
    made = {}

    def make(family):
        if family not in made:
            folder = tmp_path_factory.mktemp("wide")
            config = hf.config_of(family)
            sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
            config = type(config).from_dict({**config.to_dict(), **sizes})
            if family == "gemma3-of-gguf":
                config.query_pre_attn_scalar = 64
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(hf.CONFIGS, family, lambda: config)
                made[family] = make_gguf(folder, family)[1]
        return made[family]

    return make


@pytest.mark.parametrize(
    "family",
    [
        *("llama", "gemma3-of-gguf"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("mistral", "qwen2", "qwen3")),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_each_type_of_each_family_is_read_as_transformers_reads_it(kind, family, wide, tmp_path):
    path = tmp_path / "model.gguf"
    quantize(wide(family), path, kind)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, hf.VOCAB, 20))
    told = TOLD.get(family, {})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, **{**told, **SIZES_TOLD.get(family, {})}
    )
    with torch.no_grad():
        expected = theirs.eval()(input_ids=tokens[None]).logits[0]

    actual = logits(path, tokens)

    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@np.errstate(all="ignore")  # random bytes are all sorts of numbers
def test_every_supported_type_is_dequantized(kind, tmp_path):
    """Block by block gives the same as all at once."""
    expected = write_quantized(tmp_path / "x.gguf", kind)
    file = header.read(tmp_path / "x.gguf")
    theirs = gguf.GGUFReader(tmp_path / "x.gguf").tensors[0].data
    if expected is None:
        expected = np.asarray(theirs, np.float32)

    rows = [reading.read_rows(file, file.tensors["output.weight"], i, i + 2) for i in (0, 2, 4)]

    assert np.array_equal(expected, np.concatenate(rows), equal_nan=True)


def test_a_gemma_that_llama_cpp_would_compute_differently_is_not_written(tmp_path):
    """The scale of its attention is not in the file: llama.cpp has it in its code."""
    base = hf.make_base(tmp_path / "base", "gemma3")

    with pytest.raises(
        ValueError, match=r"query_pre_attn_scalar = 5 .* llama.cpp computes with 16"
    ):
        gguf_writer.write(base, tmp_path / "model.gguf")

    assert not (tmp_path / "model.gguf").exists()


def test_weights_that_cannot_be_stored_are_an_os_error(tmp_path):
    """safetensors has an error of its own for it, which callers would take for a bad file."""
    _, path = make_gguf(tmp_path)
    for folder in ("out", "again"):
        (tmp_path / folder).mkdir()
    reading.write_directory(path, tmp_path / "out")
    largest = (tmp_path / "out" / "model.safetensors").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            reading.write_directory(path, tmp_path / "again")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert errno.EFBIG == caught.value.errno


def test_a_gemma_file_is_saved_as_a_directory(tmp_path):
    """With the settings that the file leaves to the program."""
    _, path = make_gguf(tmp_path, "gemma3-of-gguf")
    (tmp_path / "out").mkdir()

    reading.write_directory(path, tmp_path / "out", torch.float32)

    tokens = torch.arange(30)
    with torch.no_grad():
        expected = hf.load_base(tmp_path / "out")(input_ids=tokens[None]).logits[0]
    torch.testing.assert_close(logits(path, tokens), expected, atol=1e-4, rtol=1e-4)


def test_a_gguf_file_is_trained_sampled_and_merged_like_any_base_model(tmp_path):
    base, path = make_gguf(tmp_path)
    engine = Engine(device="cpu", threads=1)
    for name in (str(base), str(path)):
        engine.load_base(name)
        engine.create_model(name, name, types.LoraConfig(rank=4), seed=0)
    data = [hf.datum(np.arange(20) % hf.VOCAB)]

    losses = [
        hf.drive(engine.forward_backward(str(name), data, "cross_entropy", None)).loss
        for name in (base, path)
    ]

    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert str(path) == engine.base_info(str(path)).tokenizer_id


def test_the_tokenizer_and_the_chat_template_come_out_of_the_file(tmp_path):
    base, path = make_gguf(tmp_path)
    expected, actual = tokenizer.load(str(base)), tokenizer.load(str(path))
    text = "<|turn|>user\nGrüße, it's 42!<|end_turn|>"

    assert expected.encode(text) == actual.encode(text)
    assert text == actual.decode(actual.encode(text))
    assert expected.chat_template == actual.chat_template
    assert expected.eos_token_id == actual.eos_token_id


def byte_level(pattern, **model):
    """A small byte-level tokenizer that splits like *pattern*."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE(**model))
    trained.pre_tokenizer = pattern
    trained.decoder = decoders.ByteLevel()
    texts = [Path(__file__).read_text(encoding="utf-8"), "Grüße 2024 naïve it's DON'T"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(texts, trainer)
    return trained


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"])
def test_each_way_of_splitting_words_is_recognised_and_restored(name, tmp_path):
    base = hf.make_base(tmp_path / "base")
    original = byte_level(header.splitter(name))
    original.save(str(base / "tokenizer.json"))
    gguf_writer.write(base, tmp_path / "model.gguf", "F16")
    file = header.read(tmp_path / "model.gguf")
    text = Path(header.__file__).read_text(encoding="utf-8")[:3000] + " I'll pay 12345!\n\n  x"

    actual = header.build_tokenizer(file)

    assert name == file.metadata["tokenizer.ggml.pre"]
    expected = [piece for piece, _ in original.pre_tokenizer.pre_tokenize_str(text)]
    assert expected == [piece for piece, _ in actual.pre_tokenizer.pre_tokenize_str(text)]
    assert original.encode(text).ids == actual.encode(text).ids


# What is refused


def refused(path):
    with pytest.raises(ValueError) as caught:
        loading.load(str(path), CPU)
    return str(caught.value)


@pytest.mark.parametrize("part", [0.0005, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused_wherever_it_ends(part, tmp_path):
    _, path = make_gguf(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: max(5, int(len(whole) * part))])

    message = refused(path)

    assert "truncated" in message
    assert "download it again" in message


def test_a_file_of_another_format_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04" + bytes(100))

    assert "is not a GGUF file: it begins with b'PK" in refused(tmp_path / "model.gguf")


def test_a_git_lfs_pointer_is_named_as_such(tmp_path):
    (tmp_path / "model.gguf").write_text("version https://git-lfs.github.com/spec/v1\n")

    assert "git lfs pull" in refused(tmp_path / "model.gguf")


def test_an_unknown_quantization_is_named_with_those_that_work(tmp_path):
    _, path = make_gguf(tmp_path)
    file = header.read(path)
    name = file.tensors["output.weight"].name.encode()
    raw = bytearray(path.read_bytes())
    at = raw.index(name) + len(name) + 4 + 2 * 8
    raw[at : at + 4] = (10).to_bytes(4, "little")
    path.write_bytes(raw)

    assert "'output.weight' is quantized as Q2_K; supported are F32, F16, Q4_0" in refused(path)


def test_another_architecture_is_named_with_those_that_work(tmp_path):
    _, path = make_gguf(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"llama", b"gemma", 1))

    assert "it has architecture 'gemma'" in refused(path)


def test_a_missing_tensor_is_named(tmp_path):
    _, path = make_gguf(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.7.ffn_up.weight"))

    assert "no tensor 'blk.1.ffn_up.weight'" in refused(path)


# Files whose metadata asks for what the engine does not compute


@pytest.fixture(scope="module")
def readable(tmp_path_factory):
    """The header of a file that can be computed."""
    return header.read(make_gguf(tmp_path_factory.mktemp("readable"))[1])


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.expert_count": 8}, "it is a mixture of experts"),
        ({"llama.attention.head_count": [4, 2]}, "layers have different numbers of heads"),
        ({"llama.attention.head_count_kv": [2, 1]}, "layers have different numbers of heads"),
        ({"llama.rope.dimension_count": 4}, "only a part of each head is rotated"),
        ({"llama.embedding_length": None}, "no 'llama.embedding_length'; convert the model again"),
        ({"llama.rope.scaling.type": "yarn"}, "scales positions as 'yarn'; supported"),
    ],
)
def test_what_a_file_asks_for_and_this_server_does_not_compute_is_named(
    readable, metadata, message
):
    """Instead of numbers that are almost right."""
    file = attrs.evolve(readable, metadata={**readable.metadata, **metadata})

    with pytest.raises(header.GgufError, match=message):
        reading.config(file)


def test_positions_that_are_scaled_linearly_are_read_as_such(readable):
    scaled = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    file = attrs.evolve(readable, metadata={**readable.metadata, **scaled})

    content = reading.config(file)

    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    assert rope == content["rope_parameters"]
    plain = reading.inverse_frequencies(readable, reading.config(readable))[""]
    torch.testing.assert_close(4 * reading.inverse_frequencies(file, content)[""], plain)


def test_a_tensor_that_the_architecture_does_not_have_is_named(readable):
    """Ignoring it would compute another model."""
    extra = attrs.evolve(readable.tensors["output_norm.weight"], name="blk.0.extra.weight")
    file = attrs.evolve(readable, tensors={**readable.tensors, extra.name: extra})

    with pytest.raises(header.GgufError, match=r"the tensor 'blk\.0\.extra\.weight', which is not"):
        reading.Tensors(file, reading.config(readable), torch.float32, CPU)


def test_a_file_that_is_cut_while_it_is_read_is_not_taken_for_zeros(tmp_path):
    _, path = make_gguf(tmp_path)
    file = header.read(path)
    last = max(file.tensors.values(), key=lambda info: info.offset)
    tensors = reading.Tensors(file, reading.config(file), torch.float32, CPU)
    path.write_bytes(path.read_bytes()[: last.offset + 4])

    with pytest.raises(
        header.GgufError, match=f"truncated within {last.name!r}; download it again"
    ):
        tensors[reading.hf_name(last.name, "llama")]


def test_rotary_factors_cannot_be_written_in_a_configuration(tmp_path):
    """Such a file is computed, but not saved as a directory that would compute something else."""
    _, path = make_gguf(tmp_path, "llama3-rope")
    (tmp_path / "out").mkdir()

    with pytest.raises(header.GgufError, match="rotary frequencies have separate factors"):
        reading.write_directory(path, tmp_path / "out")

    assert [] == list((tmp_path / "out").iterdir())


# What is not written


def _changed_base(folder, kind, **settings):
    base = hf.make_base(folder / "base", kind)
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return base


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
FULL = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4}


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("llama", {"model_type": "gpt2"}, "architecture 'gpt2' cannot be written"),
        ("llama", {"rope_parameters": YARN}, "of type 'yarn' cannot be written"),
        (
            "gemma3-of-gguf",
            {"rope_parameters": {"full_attention": FULL, "sliding_attention": YARN}},
            "scaled positions of layers with a window cannot be written",
        ),
    ],
)
def test_an_architecture_that_gguf_cannot_express_is_not_written(kind, settings, message, tmp_path):
    """llama.cpp would load the file, and answer nonsense."""
    base = _changed_base(tmp_path, kind, **settings)

    with pytest.raises(ValueError, match=message):
        gguf_writer.write(base, tmp_path / "model.gguf")

    assert not (tmp_path / "model.gguf").exists()


def test_an_unknown_type_is_named_with_those_that_can_be_written(tmp_path):
    with pytest.raises(ValueError, match="'Q2_K' cannot be written; choose F16, Q8_0, F32"):
        gguf_writer.write(hf.make_base(tmp_path / "base"), tmp_path / "model.gguf", "Q2_K")


def test_a_tokenizer_that_gguf_cannot_express_is_not_written(tmp_path):
    from tokenizers import Tokenizer, models

    base = hf.make_base(tmp_path / "base")
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(base / "tokenizer.json"))
    with pytest.raises(ValueError, match="a tokenizer of type 'WordLevel' cannot be written"):
        gguf_writer.write(base, tmp_path / "model.gguf")

    (base / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer\.json; a GGUF file needs it"):
        gguf_writer.write(base, tmp_path / "model.gguf")


def test_matrices_of_8_bits_are_near_the_model_s(tmp_path):
    """Rows of 48 numbers, no multiple of a block of 32, stay in 16 bits."""
    base, path = make_gguf(tmp_path, "llama", "Q8_0")
    file = header.read(path)
    tokens = torch.arange(40)
    with torch.no_grad():
        expected = hf.load_base(base)(input_ids=tokens[None]).logits[0]

    kinds = {name: reading.TYPES[info.kind][0] for name, info in file.tensors.items()}
    assert ("Q8_0", "F16", "F32") == tuple(
        kinds[name]
        for name in ("blk.0.ffn_up.weight", "blk.0.ffn_down.weight", "output_norm.weight")
    )
    error = logits(path, tokens) - expected
    assert 0 < float(error.norm() / expected.norm()) < 0.03


def test_the_base_of_a_gemma_s_windows_is_written_where_it_is_not_the_usual_one(tmp_path):
    """Read back with it, by us; llama.cpp would use the usual one if it were not in the file."""
    windows = {"rope_type": "default", "rope_theta": 2e4}
    base = _changed_base(
        tmp_path,
        "gemma3-of-gguf",
        rope_parameters={"full_attention": FULL, "sliding_attention": windows},
    )
    gguf_writer.write(base, tmp_path / "model.gguf", "F32")

    content = reading.config(header.read(tmp_path / "model.gguf"))

    assert windows == content["rope_parameters"]["sliding_attention"]


def test_several_ends_of_text_are_written_and_read_as_ends(tmp_path):
    """Without a tokenizer_config.json, those of the model's configuration."""
    base = _changed_base(tmp_path, "llama", eos_token_id=[257, 259])
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (base / name).unlink(missing_ok=True)
    gguf_writer.write(base, tmp_path / "model.gguf")

    file = header.read(tmp_path / "model.gguf")

    assert [257, 259] == reading.config(file)["eos_token_id"]
    assert "tokenizer.chat_template" not in file.metadata
