"""Adapters as files: PEFT reads ours and we read PEFT's."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.support import hf_reference as hf
from tinkex import types
from tinkex.engine import checkpoints, loading, lora
from tinkex.engine.engine import Engine

TOKENS = np.arange(40) * 7 % hf.VOCAB


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def base(request, tmp_path_factory):
    """A model with a separate head, and one whose head is its embedding."""
    return hf.make_base(tmp_path_factory.mktemp("base"), request.param)


def _trained(base, config, *, steps=2):
    """An engine with a model that has been trained for a few steps."""
    engine = Engine(device="cpu", threads=1)
    engine.load_base(str(base))
    engine.create_model("m", str(base), config, seed=3)
    for _ in range(steps):
        hf.drive(engine.forward_backward("m", [hf.datum(TOKENS)], "cross_entropy", None))
        engine.optim_step("m", types.AdamParams(learning_rate=1e-2))
    return engine


def _logprobs(engine, model_id="m"):
    data = [hf.datum(TOKENS)]
    output = hf.drive(
        engine.forward_backward(model_id, data, "cross_entropy", None, forward_only=True)
    )
    return output.loss_fn_outputs[0]["logprobs"].to_numpy()


def _saved(engine, directory, *, optimizer=False):
    directory.mkdir()
    engine.save("m", directory, optimizer=optimizer)
    return directory


@pytest.mark.parametrize(
    "config",
    [
        types.LoraConfig(rank=32),
        types.LoraConfig(rank=5, train_unembed=False),
        types.LoraConfig(rank=8, train_mlp=False, train_unembed=False),
        types.LoraConfig(rank=4, train_attn=False, train_mlp=False),
    ],
)
def test_peft_loads_what_we_save(base, config, tmp_path):
    """Without a change, and computes the same with it."""
    engine = _trained(base, config)

    directory = _saved(engine, tmp_path / "saved")

    reference = hf.load_adapter(base, directory)
    expected = hf.logprobs(reference, TOKENS[:-1], TOKENS[1:]).detach().numpy()
    np.testing.assert_allclose(_logprobs(engine), expected, atol=2e-5)


def test_we_load_what_peft_saves(base, tmp_path):
    """Whatever alpha it has: ours is 32, so the difference goes into B."""
    adapter = hf.make_adapter(base, tmp_path / "adapter", rank=4, lora_alpha=7)
    engine = Engine(device="cpu", threads=1)
    engine.load_base(str(base))

    engine.create_model("m", str(base), types.LoraConfig(rank=4), seed=0, adapter=adapter)

    reference = hf.load_adapter(base, adapter)
    expected = hf.logprobs(reference, TOKENS[:-1], TOKENS[1:]).detach().numpy()
    np.testing.assert_allclose(_logprobs(engine), expected, atol=2e-5)


def test_we_load_what_peft_saves_of_our_adapter(base, tmp_path):
    """With the head adapted, PEFT adds copies of frozen base weights (base_layer.weight)."""
    ours = _trained(base, types.LoraConfig(rank=4, train_unembed=True))
    reference = hf.load_adapter(base, _saved(ours, tmp_path / "saved"))
    reference.save_pretrained(tmp_path / "again", save_embedding_layers=True)
    names = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert any(name.endswith("lm_head.base_layer.weight") for name in names)
    engine = Engine(device="cpu", threads=1)
    engine.load_base(str(base))

    engine.create_model("m", str(base), types.LoraConfig(4), seed=0, adapter=tmp_path / "again")

    np.testing.assert_allclose(_logprobs(engine), _logprobs(ours), atol=2e-5)
    merged = checkpoints.read_info(tmp_path / "again", _linears(base))
    assert (4, True) == (merged.shape.rank, merged.shape.train_unembed)


@pytest.mark.parametrize(("kind", "warns"), [("llama", False), ("qwen3", True)])
@pytest.mark.parametrize("train_unembed", [True, False, None])
def test_an_adapter_of_a_tied_head_is_warned_of(kind, warns, train_unembed, tmp_path, caplog):
    """PEFT would merge it into the embedding as well."""
    base = hf.make_base(tmp_path / "base", kind)

    _trained(base, types.LoraConfig(4, train_unembed=train_unembed), steps=0)

    assert (warns and train_unembed is True) == ("tied to its embedding" in caplog.text)


@pytest.mark.parametrize(
    ("kind", "config", "expected"),
    [
        ("llama", types.LoraConfig(4), True),
        ("qwen3", types.LoraConfig(4), False),
        ("qwen3", types.LoraConfig(4, train_unembed=True), True),
        ("llama", types.LoraConfig(4, train_unembed=False), False),
        ("qwen3", types.LoraConfig(4, train_mlp=False, train_attn=False), True),
    ],
    ids=["untied", "tied", "tied-but-asked-for", "untied-but-refused", "nothing-else-to-train"],
)
def test_the_head_is_adapted_unless_it_is_tied(kind, config, expected, tmp_path):
    base = hf.make_base(tmp_path / "base", kind)

    engine = _trained(base, config, steps=0)

    assert expected is engine.lora_config("m").train_unembed
    directory = _saved(engine, tmp_path / "saved")
    written = json.loads((directory / "adapter_config.json").read_text())
    assert expected == ("lm_head" in written["target_modules"])


def test_an_adapter_of_a_head_is_started_from_with_its_head(tmp_path):
    """Although the head is tied, and the settings leave the choice to the engine."""
    base = hf.make_base(tmp_path / "base", "qwen3")
    adapter = hf.make_adapter(base, tmp_path / "adapter", rank=4)
    engine = Engine(device="cpu", threads=1)
    engine.load_base(str(base))

    engine.create_model("m", str(base), types.LoraConfig(rank=4), seed=0, adapter=adapter)

    assert engine.lora_config("m").train_unembed is True
    reference = hf.load_adapter(base, adapter)
    expected = hf.logprobs(reference, TOKENS[:-1], TOKENS[1:]).detach().numpy()
    np.testing.assert_allclose(_logprobs(engine), expected, atol=2e-5)


def test_peft_merges_what_we_train_by_default(base, tmp_path):
    """Rightly, whether the head is the embedding or not."""
    engine = _trained(base, types.LoraConfig(rank=4))

    merged = hf.load_adapter(base, _saved(engine, tmp_path / "saved")).merge_and_unload()

    merged.save_pretrained(tmp_path / "merged")
    reread = hf.load_base(tmp_path / "merged")
    actual = hf.logprobs(reread, TOKENS[:-1], TOKENS[1:]).detach().numpy()
    np.testing.assert_allclose(actual, _logprobs(engine), atol=2e-5)


#: Linear layers of Llama and Qwen in vLLM, unpacked, and what it takes besides them.
VLLM_MODULES = {
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("embed_tokens", "lm_head"),
}


def test_vllm_knows_the_names_in_a_saved_adapter(base, tmp_path):
    """By the rules of its LoRA loader: a prefix, a module that it adapts, lora_A or lora_B."""
    directory = _saved(_trained(base, types.LoraConfig(rank=4), steps=0), tmp_path / "saved")

    names = load_file(directory / "adapter_model.safetensors")
    for name in names:
        first, second, *module, letter, last = name.split(".")
        assert ("base_model", "model", "weight") == (first, second, last)
        assert letter in ("lora_A", "lora_B")
        assert module[-1] in VLLM_MODULES
    config = json.loads((directory / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules"} <= set(config)
    assert set(config["target_modules"]) == {name.split(".")[-3] for name in names}
    assert not config["modules_to_save"] and not config["use_dora"] and config["bias"] == "none"


def test_an_adapter_of_fewer_modules_leaves_the_others_alone(base, tmp_path):
    """PEFT's usual adapters are of q_proj and v_proj only."""
    adapter = hf.make_adapter(base, tmp_path / "a", rank=4, target_modules=["q_proj", "v_proj"])
    engine = Engine(device="cpu", threads=1)
    engine.load_base(str(base))

    engine.create_model("m", str(base), types.LoraConfig(rank=4), seed=0, adapter=adapter)

    reference = hf.load_adapter(base, adapter)
    expected = hf.logprobs(reference, TOKENS[:-1], TOKENS[1:]).detach().numpy()
    np.testing.assert_allclose(_logprobs(engine), expected, atol=2e-5)


@pytest.mark.parametrize("config", [types.LoraConfig(rank=4), types.LoraConfig(4, None, False)])
def test_a_merged_model_is_the_adapted_one(base, config, tmp_path):
    """merge_adapter's directory needs neither PEFT nor us; a tied head that changed is untied."""
    directory = _saved(_trained(base, config), tmp_path / "saved")

    checkpoints.merge_adapter(str(base), directory, tmp_path / "merged")

    reference = hf.load_adapter(base, directory)
    merged = hf.load_base(tmp_path / "merged")
    ids = torch.from_numpy(TOKENS)[None]
    torch.testing.assert_close(merged(ids).logits, reference(ids).logits, atol=2e-5, rtol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").encode("a") == [97]


def test_the_built_in_model_merges_too(tmp_path):
    """So what was trained on it can leave."""
    engine = _trained("tiny", types.LoraConfig(rank=4))
    directory = _saved(engine, tmp_path / "saved")

    checkpoints.merge_adapter("tiny", directory, tmp_path / "merged")

    merged = hf.load_base(tmp_path / "merged")
    actual = hf.logprobs(merged, TOKENS[:-1], TOKENS[1:]).detach().numpy()
    np.testing.assert_allclose(actual, _logprobs(engine), atol=2e-5)


def test_merging_does_not_write_over_anything(tmp_path):
    (tmp_path / "mine").write_text("")

    with pytest.raises(ValueError, match="exists and is not an empty directory"):
        checkpoints.merge_adapter("tiny", tmp_path, tmp_path)


def test_save_load_forward_is_bit_identical(tmp_path):
    """Nothing is lost on the way to the disk and back."""
    engine = _trained("tiny", types.LoraConfig(rank=4))
    directory = _saved(engine, tmp_path / "saved")
    engine.create_model("other", "tiny", types.LoraConfig(rank=4), seed=9)

    engine.load("other", directory, optimizer=False)

    assert np.array_equal(_logprobs(engine), _logprobs(engine, "other"))


def test_training_goes_on_from_a_checkpoint_as_if_undisturbed(tmp_path):
    """With its optimizer: the same step from the same state gives the same bits."""
    engine = _trained("tiny", types.LoraConfig(rank=4))
    directory = _saved(engine, tmp_path / "saved", optimizer=True)
    engine.create_model("other", "tiny", types.LoraConfig(rank=4), seed=9)
    engine.load("other", directory, optimizer=True)

    for model_id in ("m", "other"):
        hf.drive(engine.forward_backward(model_id, [hf.datum(TOKENS)], "cross_entropy", None))
        engine.optim_step(model_id, types.AdamParams(learning_rate=1e-2))

    assert np.array_equal(_logprobs(engine), _logprobs(engine, "other"))


def test_a_snapshot_brings_everything_back_bit_by_bit(tmp_path):
    """Weights, moments, step count and the gradient that has not been used yet."""
    engine = _trained("tiny", types.LoraConfig(rank=4))
    hf.drive(engine.forward_backward("m", [hf.datum(TOKENS)], "cross_entropy", None))
    (tmp_path / "snapshot").mkdir()
    engine.snapshot("m", tmp_path / "snapshot")
    engine.optim_step("m", types.AdamParams(learning_rate=1e-2))
    expected = _logprobs(engine)
    again = Engine(device="cpu", threads=1)
    again.load_base("tiny")

    again.restore("m", tmp_path / "snapshot")
    again.optim_step("m", types.AdamParams(learning_rate=1e-2))

    assert np.array_equal(expected, _logprobs(again))


def _linears(base):
    return loading.load(str(base), torch.device("cpu")).base.linears


def test_a_checkpoint_says_what_it_is_of(tmp_path):
    """checkpoint.json, for the store and for weights_info."""
    engine = _trained("tiny", types.LoraConfig(rank=4, train_unembed=False))

    directory = _saved(engine, tmp_path / "saved")

    info = checkpoints.read_info(directory, _linears("tiny"))
    assert checkpoints.Info("tiny", lora.Shape(4, True, True, False)) == info
    written = json.loads((directory / "checkpoint.json").read_text())
    assert (1, 32, "tiny") == (written["format"], written["alpha"], written["base_model"])


def test_a_peft_adapter_says_what_it_is_of(base, tmp_path):
    """Without our file, from its own modules."""
    adapter = hf.make_adapter(base, tmp_path / "a", rank=4, target_modules=["q_proj", "down_proj"])

    assert lora.Shape(4, True, True, False) == checkpoints.read_info(adapter, _linears(base)).shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "is of type 'IA3'; only LORA can be read"),
        ({"use_dora": True}, "has use_dora = True; only plain LoRA"),
        ({"rank_pattern": {"q_proj": 2}}, "has rank_pattern"),
        ({"r": 8}, "has rank 8, the model 4; create the model with rank 8"),
    ],
)
def test_adapters_that_we_cannot_compute_are_refused(change, message, tmp_path):
    """Rather than computed wrongly."""
    engine = _trained("tiny", types.LoraConfig(rank=4), steps=0)
    directory = _saved(engine, tmp_path / "saved")
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))

    with pytest.raises(ValueError, match=message):
        engine.create_model("n", "tiny", types.LoraConfig(rank=4), seed=0, adapter=directory)


def test_what_does_not_fit_is_refused(tmp_path):
    """With what does not fit, and what to do."""
    engine = _trained("tiny", types.LoraConfig(rank=4))
    directory = _saved(engine, tmp_path / "saved")
    engine.create_model("other", "tiny", types.LoraConfig(rank=8), seed=0)
    before = _logprobs(engine, "other")

    with pytest.raises(ValueError, match="rank 4 on attn, mlp, unembed, the model of rank 8"):
        engine.load("other", directory, optimizer=False)
    with pytest.raises(ValueError, match="holds no optimizer state"):
        engine.load("m", directory, optimizer=True)
    with pytest.raises(ValueError, match=r"it lacks adapter_config\.json"):
        engine.load("m", tmp_path, optimizer=False)
    (directory / "checkpoint.json").write_text('{"format": 1, "base_model": "tiny"}')
    with pytest.raises(ValueError, match="lacks 'rank'; it is incomplete"):
        engine.load("m", directory, optimizer=False)
    (directory / "checkpoint.json").unlink()
    (directory / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        engine.load("m", directory, optimizer=False)
    assert np.array_equal(before, _logprobs(engine, "other"))


def test_a_checkpoint_of_another_base_is_refused(base, tmp_path):
    config = types.LoraConfig(rank=4, train_unembed=True)
    directory = _saved(_trained(base, config, steps=0), tmp_path / "saved")
    engine = _trained("tiny", config, steps=0)

    with pytest.raises(ValueError, match=r"is of the base model .*, not of 'tiny'"):
        engine.load("m", directory, optimizer=False)


# Files that are damaged, or belong to something else: the model keeps what it has.


def _change_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def _change_json(path, **settings):
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


LAST = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({LAST: torch.ones(3, 4)}),
            r"shape \[3, 4\], where the model has shape",
        ),
        (
            lambda t: t.update({LAST.replace("v_proj", "x_proj"): torch.ones(3, 4)}),
            "where the model has nothing; it belongs to another base model",
        ),
        (lambda t: t.update({"bias": torch.ones(2)}), "holds 'bias', which is not a LoRA matrix"),
    ],
)
def test_an_adapter_with_one_wrong_matrix_changes_nothing(change, message, tmp_path):
    """The right matrices before it are read first, but not into the model."""
    engine = _trained("tiny", types.LoraConfig(rank=4))
    directory = _saved(engine, tmp_path / "saved")
    hf.drive(engine.forward_backward("m", [hf.datum(TOKENS)], "cross_entropy", None))
    engine.optim_step("m", types.AdamParams(learning_rate=1e-2))
    before = _logprobs(engine)
    _change_tensors(directory / "adapter_model.safetensors", change)

    with pytest.raises(ValueError, match=message):
        engine.load("m", directory, optimizer=False)

    assert np.array_equal(before, _logprobs(engine))


def test_an_optimizer_state_of_another_model_changes_nothing(tmp_path):
    """Weights are not loaded without the optimizer state that was asked for."""
    engine = _trained("tiny", types.LoraConfig(rank=4))
    directory = _saved(engine, tmp_path / "saved", optimizer=True)
    hf.drive(engine.forward_backward("m", [hf.datum(TOKENS)], "cross_entropy", None))
    engine.optim_step("m", types.AdamParams(learning_rate=1e-2))
    before = _logprobs(engine)
    _change_tensors(directory / checkpoints.OPTIMIZER, lambda t: t.update(m=torch.zeros(7)))

    with pytest.raises(ValueError, match="is of 7 parameters, the model has"):
        engine.load("m", directory, optimizer=True)

    assert np.array_equal(before, _logprobs(engine))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(weights=torch.zeros(7)), "is of another base model"),
        (lambda t: t.pop("gradient"), "lacks gradient; it is incomplete"),
    ],
)
def test_a_damaged_snapshot_leaves_the_model_as_it_is(change, message, tmp_path):
    engine = _trained("tiny", types.LoraConfig(rank=4))
    (tmp_path / "snapshot").mkdir()
    engine.snapshot("m", tmp_path / "snapshot")
    before = _logprobs(engine)
    [file] = (tmp_path / "snapshot").glob("*.safetensors")
    _change_tensors(file, change)

    with pytest.raises(ValueError, match=message):
        engine.restore("m", tmp_path / "snapshot")

    assert np.array_equal(before, _logprobs(engine))


def test_a_checkpoint_of_a_later_version_is_refused(tmp_path):
    """Its numbers may mean something else."""
    engine = _trained("tiny", types.LoraConfig(rank=4), steps=0)
    directory = _saved(engine, tmp_path / "saved")
    _change_json(directory / "checkpoint.json", format=2)

    with pytest.raises(ValueError, match="has format 2; this version of tinkex reads format 1"):
        engine.load("m", directory, optimizer=False)


def test_a_configuration_that_is_no_object_is_refused(tmp_path):
    directory = _saved(_trained("tiny", types.LoraConfig(rank=4), steps=0), tmp_path / "saved")
    (directory / "adapter_config.json").write_text("[]")

    with pytest.raises(ValueError, match=r"adapter_config\.json' does not hold a JSON object"):
        checkpoints.merge_adapter("tiny", directory, tmp_path / "out")


def _move_to_layer_7(name, tensors):
    for one in (name, name.replace("lora_B", "lora_A")):
        tensors[one.replace(".1.", ".7.")] = tensors.pop(one)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, t: t.update({name: torch.ones(3, 4)}), r"by shape \[3, \d+\], but the base"),
        (_move_to_layer_7, "which the base model does not have; it belongs to another base model"),
    ],
    ids=["shape", "absent"],
)
def test_an_adapter_of_another_model_is_not_merged(kind, change, message, tmp_path):
    """On both paths, and no configuration is written that would make the rest look whole."""
    base = hf.make_base(tmp_path / "base", kind)
    adapter = hf.make_adapter(base, tmp_path / "adapter", rank=4)
    path = adapter / "adapter_model.safetensors"
    name = next(n for n in sorted(load_file(path)) if ".1." in n and n.endswith("lora_B.weight"))
    _change_tensors(path, lambda tensors: change(name, tensors))

    with pytest.raises(ValueError, match=message):
        checkpoints.merge_adapter(str(base), adapter, tmp_path / "out")

    assert not (tmp_path / "out" / "config.json").exists()


def test_a_base_model_without_weights_is_not_merged(tmp_path):
    base = hf.make_base(tmp_path / "base", "llama")
    adapter = hf.make_adapter(base, tmp_path / "adapter", rank=4)
    (base / "model.safetensors").unlink()

    with pytest.raises(ValueError, match=r"holds no \*\.safetensors weights"):
        checkpoints.merge_adapter(str(base), adapter, tmp_path / "out")


def test_a_head_that_is_untied_is_listed_with_the_other_parts(tmp_path):
    """A model of several files is read by its index: without an entry, the head would be lost."""
    whole = hf.make_base(tmp_path / "whole", "qwen3")
    parts = tmp_path / "parts"
    hf.load_base(whole).save_pretrained(parts, max_shard_size="20KB")
    adapter = hf.make_adapter(whole, tmp_path / "adapter", rank=4)
    ids = torch.from_numpy(TOKENS)[None]

    checkpoints.merge_adapter(str(parts), adapter, tmp_path / "merged")

    with torch.no_grad():
        expected = hf.load_adapter(whole, adapter)(ids).logits
        actual = hf.load_base(tmp_path / "merged")(ids).logits
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)
