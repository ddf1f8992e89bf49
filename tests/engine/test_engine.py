"""The engine's contract: determinism, several models, errors that leave everything as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support import hf_reference as hf
from tinkex import types
from tinkex.engine import cpu_parallel, tiny, training_pass
from tinkex.engine.engine import Engine
from tinkex.engine.losses import LOSSES

ADAM = types.AdamParams(learning_rate=1e-2)


def _engine(*models, threads=1, dtype="auto", **config):
    engine = Engine(device="cpu", threads=threads, dtype=dtype)
    engine.load_base("tiny")
    for i, model_id in enumerate(models):
        engine.create_model(model_id, "tiny", types.LoraConfig(rank=4, **config), seed=i)
    return engine


def _data(seed=0, lengths=(3, 50, 20, 90)):
    rng = np.random.default_rng(seed)
    return [hf.datum(rng.integers(0, 256, n + 1)) for n in lengths]


def _step(engine, model_id, data):
    output = hf.drive(engine.forward_backward(model_id, data, "cross_entropy", None))
    engine.optim_step(model_id, ADAM)
    return output


def _weights(engine, model_id):
    return engine._models[model_id].weights.clone()


def test_a_fresh_adapter_is_the_base_model():
    """B is zero: the same logprobs, to the last bit, whatever the rank and the seed."""
    engine = _engine("m")
    engine.create_model("n", "tiny", types.LoraConfig(rank=7, train_mlp=False), seed=99)
    prompt = list(range(100))
    engine.open_sampler("s", "tiny")
    more = {"prompt_logprobs": True}
    engine.submit_sample("t", "s", types.SampleRequest(types.ModelInput.from_ints(prompt), **more))
    base = hf.sample_all(engine)["t"].prompt_logprobs_np[1:]

    outputs = [
        hf.drive(
            engine.forward_backward(m, [hf.datum(prompt)], "cross_entropy", None, forward_only=True)
        )
        for m in "mn"
    ]

    first, second = (o.loss_fn_outputs[0]["logprobs"].to_numpy() for o in outputs)
    assert np.array_equal(first, second)
    np.testing.assert_allclose(first, base, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_two_runs_with_one_seed_are_bit_identical(threads, monkeypatch):
    """Whatever else the server does in between, and whichever worker is done first."""
    monkeypatch.setattr(cpu_parallel, "MIN_PORTION", 1)
    quiet, busy = _engine("m", threads=threads), _engine("m", "other", threads=threads)
    for i in range(3):
        _step(quiet, "m", _data(i))
    busy.open_sampler("s", "tiny")
    for i in range(3):
        pass_ = busy.forward_backward("m", _data(i), "cross_entropy", None)
        next(pass_)
        _step(busy, "other", _data(i + 7))
        busy.submit_sample(i, "s", types.SampleRequest(types.ModelInput.from_ints([1, 2])))
        busy.sample_step()
        hf.drive(pass_)
        busy.optim_step("m", ADAM)

    assert torch.equal(_weights(quiet, "m"), _weights(busy, "m"))


@pytest.mark.parametrize("threads", [1, 2])
def test_passes_of_two_models_may_alternate(threads, monkeypatch):
    """Each micro-batch computes with its own weights, though the room for them is shared."""
    monkeypatch.setattr(training_pass, "tokens_per_batch", lambda *args: 64)
    monkeypatch.setattr(cpu_parallel, "MIN_PORTION", 1)
    engine, reference = (_engine("a", "b", threads=threads) for _ in range(2))
    for one in (engine, reference):
        for model_id in "ab":
            _step(one, model_id, _data(3, (20, 20)))
    running = [engine.forward_backward(m, _data(5), "cross_entropy", None) for m in "ab"]
    results = {}
    while len(results) < 2:
        for model_id, pass_ in zip("ab", running):
            try:
                next(pass_)
            except StopIteration as stop:
                results.setdefault(model_id, stop.value)

    for model_id in "ab":
        expected = hf.drive(reference.forward_backward(model_id, _data(5), "cross_entropy", None))
        assert expected.loss == results[model_id].loss
        assert torch.equal(reference._models[model_id].gradient, engine._models[model_id].gradient)


def test_gradients_add_up_until_the_step_uses_them():
    """Two halves of a batch are the batch."""
    halves, whole = _engine("m"), _engine("m")
    data = _data()

    for half in (data[:2], data[2:]):
        hf.drive(halves.forward_backward("m", half, "cross_entropy", None))
    hf.drive(whole.forward_backward("m", data, "cross_entropy", None))

    gradients = [one._models["m"].gradient for one in (halves, whole)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)
    assert {} == whole.optim_step("m", ADAM).metrics
    assert not whole._models["m"].gradient.any()
    assert {"no_gradient": 1.0} == whole.optim_step("m", ADAM).metrics


def test_forward_touches_nothing():
    engine = _engine("m")

    hf.drive(engine.forward_backward("m", _data(), "cross_entropy", None, forward_only=True))

    assert not engine._models["m"].gradient.any()


def test_results_come_in_the_order_of_the_data():
    """Though the datums are computed sorted by length."""
    engine = _engine("m")
    data = _data()

    together = hf.drive(engine.forward_backward("m", data, "cross_entropy", None))

    for datum, output in zip(data, together.loss_fn_outputs):
        alone = hf.drive(engine.forward_backward("m", [datum], "cross_entropy", None))
        np.testing.assert_allclose(
            output["logprobs"].to_numpy(),
            alone.loss_fn_outputs[0]["logprobs"].to_numpy(),
            atol=1e-4,
        )


def test_the_size_of_micro_batches_does_not_show(monkeypatch):
    """Sums are sums, however they are cut; only other work gets its turn more often."""
    whole = _engine("m")
    expected = hf.drive(whole.forward_backward("m", _data(), "cross_entropy", None))
    monkeypatch.setattr(training_pass, "tokens_per_batch", lambda *args: 64)
    monkeypatch.setattr(training_pass, "tokens_to_keep", lambda *args: 64)
    cut = _engine("m")

    pass_ = cut.forward_backward("m", _data(), "cross_entropy", None)
    yields = 0
    while True:
        try:
            next(pass_)
            yields += 1
        except StopIteration as stop:
            actual = stop.value
            break

    assert 3 == yields  # 90 tokens (more than fit, so recomputed); 50; 20 + 3
    assert expected.loss == pytest.approx(actual.loss, rel=1e-6)
    torch.testing.assert_close(
        cut._models["m"].gradient, whole._models["m"].gradient, rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("loss_fn", list(LOSSES))
@pytest.mark.parametrize("train_unembed", [True, False])
def test_workers_give_the_numbers_of_one_thread(loss_fn, train_unembed, monkeypatch):
    """Losses, log-probabilities in the order of the data, and gradients."""
    monkeypatch.setattr(cpu_parallel, "MIN_PORTION", 1)
    lengths = (200, 170, 90, 60, 40, 30, 20, 10)
    rng = np.random.default_rng(0)
    data = []
    for length in lengths:
        noise = rng.normal(0, 0.1, (2, length)).astype(np.float32)
        known = {"logprobs": noise[0] - 6, "advantages": noise[1]}
        known["sequence_ratio_mask"] = known["mask"] = np.ones(length, np.float32)
        names = [*types.LOSS_FUNCTIONS[loss_fn].inputs[1:]]
        if loss_fn == "trinity_ppo":
            known["ref_logprobs"] = known["logprobs"]
            names += ["mask", "ref_logprobs"]
        given = {name: known[name] for name in names}
        data.append(hf.datum(rng.integers(0, 256, length + 1), **given))
    config = {"num_total_datums": len(data)} if loss_fn == "trinity_ppo" else None
    found = []
    for threads in (1, 2, 3):
        engine = _engine("m", threads=threads, train_unembed=train_unembed)
        assert threads == len(engine._workers.divide(lengths))
        engine._models["m"].weights.normal_(0, 0.05, generator=torch.manual_seed(1))
        output = hf.drive(engine.forward_backward("m", data, loss_fn, config))
        found.append((output, engine._models["m"].gradient))

    (expected, gradient), *others = found
    for output, other in others:
        assert output.loss == pytest.approx(expected.loss, rel=1e-5)
        for one, same in zip(output.loss_fn_outputs, expected.loss_fn_outputs):
            for name in same:
                np.testing.assert_allclose(one[name].to_numpy(), same[name].to_numpy(), atol=1e-4)
        torch.testing.assert_close(other, gradient, rtol=1e-3, atol=1e-3)
    assert gradient.any()


def test_masked_positions_have_logprobs_but_no_gradient(tmp_path):
    """The head's backward pass is skipped where every weight is 0; the numbers are the same."""
    tokens = np.arange(80)
    weights = np.zeros(79, np.float32)
    weights[50:] = 1
    masked, reference = _engine("m"), _engine("m")

    output = hf.drive(
        masked.forward_backward("m", [hf.datum(tokens, weights=weights)], "cross_entropy", None)
    )
    plain = hf.drive(reference.forward_backward("m", [hf.datum(tokens)], "cross_entropy", None))

    actual, expected = (o.loss_fn_outputs[0]["logprobs"].to_numpy() for o in (output, plain))
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    assert output.loss == pytest.approx(-expected[50:].sum(), rel=1e-5)


def test_the_norm_before_clipping_is_reported():
    """As the service does, when clipping is on."""
    engine = _engine("m")
    hf.drive(engine.forward_backward("m", _data(), "cross_entropy", None))
    norm = float(torch.linalg.vector_norm(engine._models["m"].gradient))

    clipped = engine.optim_step("m", types.AdamParams(grad_clip_norm=0.1))

    assert {"unclipped_grad_l2:mean": pytest.approx(norm)} == clipped.metrics
    assert {"no_gradient": 1.0} == engine.optim_step("m", types.AdamParams()).metrics


def test_a_gradient_that_is_not_finite_is_not_applied():
    """Rather than turning the weights into NaN for good."""
    engine = _engine("m")
    before = _weights(engine, "m")
    inputs = {
        "logprobs": np.full(9, -1000.0, np.float32),
        "advantages": np.ones(9, np.float32),
    }
    data = [hf.datum(np.arange(10), **inputs)]
    hf.drive(engine.forward_backward("m", data, "importance_sampling", None))

    with pytest.raises(ValueError, match="the step was not taken and the gradient dropped"):
        engine.optim_step("m", ADAM)

    assert torch.equal(before, _weights(engine, "m"))
    _step(engine, "m", _data())


def test_the_flags_choose_what_is_trained():
    """Reach of an adapter, by size: attention 4, MLP 3 matrices a layer, and the head."""
    d, m, v = tiny.WIDTH, tiny.MLP, tiny.VOCAB
    attn, mlp, head = tiny.LAYERS * 4 * (d + d), tiny.LAYERS * 3 * (d + m), d + v

    def size(**flags):
        return len(_weights(_engine("m", **flags), "m")) / 4

    assert attn + mlp + head == size()
    assert attn == size(train_mlp=False, train_unembed=False)
    assert mlp + head == size(train_attn=False)


# -- what is wrong is said before anything is touched ----------------------------------------------


def _bad(tokens, **inputs):
    return [*_data(), hf.datum(tokens, **inputs)]


@pytest.mark.parametrize(
    ("data", "loss_fn", "message"),
    [
        ([], "cross_entropy", "data is empty"),
        (_bad([1, 512, 3]), "cross_entropy", r"data\[4\].model_input holds token id 512"),
        (_bad([1, 2, 600]), "cross_entropy", r"data\[4\].target_tokens holds token id 600 at"),
        (_bad([1] * 4098), "cross_entropy", r"data\[4\] has 4097 tokens, but .* context is 4096"),
        (_bad([1, 2, 3], weights=[1.0]), "cross_entropy", r"data\[4\].*weights.* has shape \[1\]"),
        (_bad([1, 2], weights=[np.nan]), "cross_entropy", r"data\[4\].*weights.* is nan"),
        (_data(), "ppo", "lacks the loss input 'logprobs'"),
        (_data(), "rl", "loss_fn 'rl' is not known"),
    ],
)
def test_bad_data_is_refused_whole(data, loss_fn, message):
    """The good datums before the bad one leave no gradient, and the model still works."""
    engine = _engine("m")

    with pytest.raises(ValueError, match=message):
        hf.drive(engine.forward_backward("m", data, loss_fn, None))

    assert not engine._models["m"].gradient.any()
    _step(engine, "m", _data())


def test_several_targets_are_for_cross_entropy_only():
    ones = np.ones((3, 2), np.float32)
    given = {"target_tokens": np.ones((3, 2), np.int64), "logprobs": ones, "advantages": ones}
    data = [types.Datum(types.ModelInput.from_ints([1, 2, 3]), given)]

    with pytest.raises(ValueError, match="ppo takes one value per token"):
        hf.drive(_engine("m").forward_backward("m", data, "ppo", None))


def test_ids_that_are_taken_or_unknown_are_refused():
    engine = _engine("m")
    engine.open_sampler("s", "tiny")

    with pytest.raises(ValueError, match="model 'm' already exists"):
        engine.create_model("m", "tiny", types.LoraConfig(), seed=0)
    with pytest.raises(ValueError, match="sampler 's' already exists"):
        engine.open_sampler("s", "tiny")
    engine.unload("m")
    engine.close_sampler("s")
    for call in (engine.unload, engine.clear_gradients, lambda m: engine.optim_step(m, ADAM)):
        with pytest.raises(ValueError, match="there is no model 'm' on this server"):
            call("m")
    with pytest.raises(ValueError, match="base model 'large' is not loaded here"):
        engine.create_model("n", "large", types.LoraConfig(), seed=0)


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"device 'nonsense' cannot be used here"):
        Engine(device="nonsense")


# -- base models -----------------------------------------------------------------------------------


def test_a_base_model_says_what_it_is(tmp_path):
    """Its tokenizer is found by the SDK under tokenizer_id."""
    directory = hf.make_base(tmp_path / "base", "qwen2")
    engine = _engine()

    engine.load_base(str(directory))

    info = engine.base_info("tiny")
    assert ("tiny", "tinkex/tiny", 512, 4096) == (
        info.name,
        info.tokenizer_id,
        info.vocab_size,
        info.max_context_length,
    )
    info = engine.base_info(str(directory))
    assert ("Qwen2ForCausalLM", str(directory)) == (info.architecture, info.tokenizer_id)
    assert types.SupportedModel(str(directory), 256) == info.supported_model


def test_a_directory_has_one_name_however_it_is_written(tmp_path, monkeypatch):
    """It is loaded once, and its checkpoints fit."""
    hf.make_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    engine = _engine()
    engine.load_base("base")
    engine.load_base("./base/")

    assert 2 == len(engine._bases)
    assert str(tmp_path / "base") == engine.base_info("base").name


def _without(name):
    def damage(directory):
        for file in directory.glob(name):
            file.unlink()

    return damage


def _of_type(model_type):
    def damage(directory):
        path = directory / "config.json"
        path.write_text(path.read_text().replace('"llama"', f'"{model_type}"'))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without("config.json"), r"lacks config\.json"),
        (_without("*.safetensors"), r"lacks weights \(\*\.safetensors\)"),
        (_without("tokenizer*"), "lacks a tokenizer"),
        (_of_type("t5"), r"is an encoder-decoder \(t5\); this server trains decoders"),
        (_of_type("nonsense"), "cannot load the directory"),
    ],
)
def test_a_directory_that_is_no_model_is_refused(damage, message, tmp_path):
    """With what is missing."""
    directory = hf.make_base(tmp_path / "base")
    damage(directory)

    with pytest.raises(ValueError, match=message):
        _engine().load_base(str(directory))


@pytest.mark.parametrize("name", ["/no/such/directory", "./neither/is/this"])
def test_a_path_that_is_not_there_is_refused(name):
    with pytest.raises(ValueError, match="there is no such directory"):
        _engine().load_base(name)


def test_a_hub_id_offline_says_what_to_do(monkeypatch):
    """At once, and with the way out."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(ValueError, match=r"Hugging Face hub failed: .*download the model"):
        _engine().load_base("unknown/no-such-model")


# -- half precision, as on an accelerator ----------------------------------------------------------


@pytest.fixture
def half():
    """An engine that computes in bfloat16, as it does on an accelerator."""
    return _engine("m", dtype="bfloat16")


def test_bfloat16_learns_as_float32_does(half):
    """The adapter and its optimizer stay in float32; the losses are close."""
    full = _engine("m")
    data = _data(lengths=(50, 90))

    losses = [[_step(engine, "m", data).loss for _ in range(5)] for engine in (full, half)]

    assert torch.bfloat16 == half._bases["tiny"].base.dtype
    assert torch.float32 == _weights(half, "m").dtype
    np.testing.assert_allclose(*losses, rtol=0.02)
    assert losses[1][-1] < 0.9 * losses[1][0]


def test_bfloat16_samples_what_forward_gives(half, tmp_path):
    """Within what half precision allows, for several adapters in one batch."""
    _step(half, "m", _data())
    half.save("m", tmp_path, optimizer=False)
    half.open_sampler("s", "tiny", directory=tmp_path)
    half.open_sampler("base", "tiny")
    prompt = list(range(30))
    params = types.SamplingParams(max_tokens=5, seed=0, stop=[])
    request = types.SampleRequest(types.ModelInput.from_ints(prompt), params, num_samples=3)
    for name in ("s", "base"):
        half.submit_sample(name, name, request)

    results = hf.sample_all(half)

    for sequence in results["s"].sequences:
        output = hf.drive(
            half.forward_backward(
                "m", [hf.datum(prompt + sequence.tokens)], "cross_entropy", None, forward_only=True
            )
        )
        expected = output.loss_fn_outputs[0]["logprobs"].to_numpy()[len(prompt) - 1 :]
        np.testing.assert_allclose(sequence.logprobs, expected, atol=0.1)
