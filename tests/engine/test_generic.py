"""
What is special about models that transformers' modules compute; their numbers are checked by
test_families.py.
"""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from tests.support import hf_reference as hf
from tinkex import types
from tinkex.engine import loading, lora, tiny, training_pass
from tinkex.engine.engine import Engine

#: With a cache of keys and values, with states beside them, and with none at all.
KINDS = ("gpt2", "qwen3_next", "averaging")

PROMPTS = [list(range(3, 3 + length)) for length in (9, 30, 4, 17)]


def _request(prompt, seed, *, count=1, tokens=12, **more):
    params = types.SamplingParams(max_tokens=tokens, temperature=1.0, seed=seed, stop=[])
    return types.SampleRequest(types.ModelInput.from_ints(prompt), params, count, **more)


@pytest.fixture(scope="module", params=KINDS)
def sampling(request, tmp_path_factory):
    """An engine with the bare model "bare" and two adapters of it, "a" and "b"."""
    folder = tmp_path_factory.mktemp(request.param)
    base = hf.make_base(folder / "base", request.param)
    engine = Engine(device="cpu", threads=1)
    engine.load_base(str(base))
    engine.open_sampler("bare", str(base))
    for rank, name in ((8, "a"), (4, "b")):
        adapter = hf.make_adapter(base, folder / name, rank=rank)
        engine.open_sampler(name, str(base), directory=adapter)
    return engine


def _alone(engine, sampler, request):
    engine.submit_sample("alone", sampler, request)
    return hf.sample_all(engine)["alone"].sequences


def _assert_same(ours, theirs):
    assert [s.tokens for s in theirs] == [s.tokens for s in ours]
    for one, other in zip(ours, theirs):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_sequences_join_and_leave_without_changing_the_others(sampling):
    """Of several adapters and lengths: each gets what it would get alone."""
    jobs = [
        ("a", _request(PROMPTS[0], 1, count=3)),
        ("b", _request(PROMPTS[1], 2, tokens=5)),
        ("bare", _request(PROMPTS[2], 3, count=2)),
        ("a", _request(PROMPTS[3], 4, tokens=20)),
        ("b", _request(PROMPTS[0], 5)),
        ("a", _request(PROMPTS[1], 6, tokens=1)),
    ]
    expected = [_alone(sampling, sampler, request) for sampler, request in jobs]

    found = {}
    for number, (sampler, request) in enumerate(jobs):
        sampling.submit_sample(number, sampler, request)
        for _ in range(2):
            found |= dict(sampling.sample_step())
    found |= hf.sample_all(sampling)

    for number, sequences in enumerate(expected):
        _assert_same(sequences, found[number].sequences)


def test_a_cancelled_sequence_leaves_and_the_others_go_on(sampling):
    expected = _alone(sampling, "a", _request(PROMPTS[1], 7))

    sampling.submit_sample("gone", "a", _request(PROMPTS[0], 8, count=2))
    sampling.submit_sample("stays", "a", _request(PROMPTS[1], 7))
    sampling.sample_step()
    sampling.cancel_sample("gone")
    found = hf.sample_all(sampling)

    assert ["stays"] == list(found)
    _assert_same(expected, found["stays"].sequences)


def test_prompt_logprobs_are_those_of_one_pass(sampling):
    request = _request(PROMPTS[1], 1, prompt_logprobs=True, topk_prompt_logprobs=2)
    sampling.submit_sample("t", "bare", request)
    response = hf.sample_all(sampling)["t"]

    [name] = sampling._bases
    model = loading.load(name, torch.device("cpu")).base
    tokens = torch.tensor(PROMPTS[1])
    with torch.no_grad():
        hidden = model.training_batch(hf.bare(model), [len(tokens)], recompute=False)
        logits = hf.logits(model, hidden.forward(tokens, save=False)).log_softmax(-1)
    expected = logits[:-1].gather(1, tokens[1:, None])[:, 0].numpy()

    np.testing.assert_allclose(response.prompt_logprobs[1:], expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3_moe"])
def test_layers_computed_again_give_the_same_gradients(kind, tmp_path, monkeypatch):
    """Bit for bit."""
    base = hf.make_base(tmp_path / "base", kind)
    adapter = hf.make_adapter(base, tmp_path / "adapter")
    rng = np.random.default_rng(0)
    data = [hf.datum(rng.integers(0, hf.VOCAB, n)) for n in (20, 7, 20)]

    def gradients(name):
        engine = Engine(device="cpu", threads=1)
        engine.load_base(str(base))
        engine.create_model("m", str(base), types.LoraConfig(8), seed=0, adapter=adapter)
        hf.drive(engine.forward_backward("m", data, "cross_entropy", None))
        return hf.gradients(engine, "m", tmp_path / name)

    kept = gradients("kept")
    monkeypatch.setattr(training_pass, "tokens_to_keep", lambda base: 1)
    again = gradients("again")

    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_bfloat16_is_close_to_float32(tmp_path):
    base = hf.make_base(tmp_path / "base", "gpt2")
    tokens = torch.arange(3, 60)
    exact, rounded = (
        loading.load(str(base), torch.device("cpu"), dtype).base
        for dtype in (torch.float32, torch.bfloat16)
    )

    with torch.no_grad():
        ours, theirs = (
            hf.logits(
                model,
                model.training_batch(hf.bare(model), [57], recompute=False).forward(
                    tokens, save=False
                ),
            )
            for model in (exact, rounded)
        )

    assert torch.bfloat16 == rounded.dtype
    assert float((ours - theirs).abs().max()) < 0.05 * float(ours.abs().max())


# -- what is refused, and what is read ------------------------------------------------------------


def _saved(model, directory):
    model.save_pretrained(directory)
    tiny.write_tokenizer(directory)
    return str(directory)


def _encoder_decoder(directory):
    config = transformers.T5Config(
        vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    return _saved(transformers.T5ForConditionalGeneration(config), directory)


def _bidirectional(directory):
    config = transformers.BertConfig(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    return _saved(transformers.BertLMHeadModel(config), directory)


def _with_own_code(directory):
    hf.make_base(directory, "llama")
    path = directory / "config.json"
    content = json.loads(path.read_text())
    content |= {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "own.OwnForCausalLM"}}
    path.write_text(json.dumps(content))
    (directory / "own.py").write_text("raise SystemExit('this must not run')")
    return str(directory)


def _without_a_tensor(directory):
    hf.make_base(directory, "gpt2")
    from safetensors.torch import load_file

    tensors = load_file(directory / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return str(directory)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_encoder_decoder, r"is an encoder-decoder \(t5\); this server trains decoders"),
        (_bidirectional, "attends to later tokens"),
        (_with_own_code, "is computed by its own code"),
        (_without_a_tensor, r"it lacks transformer\.h\.1\.mlp\.c_fc\.weight"),
    ],
)
def test_what_cannot_be_computed_rightly_is_refused_with_the_reason(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Engine(device="cpu", threads=1).load_base(make(tmp_path / "model"))


def test_the_text_part_of_a_vision_language_model_is_trained(tmp_path):
    """Its vision tower is not read, and its text model gives transformers' own numbers."""
    text = transformers.Gemma3TextConfig(**hf.SIZES, head_dim=16)
    vision = transformers.SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = transformers.Gemma3Config(
        text_config=text.to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=1
    )
    torch.manual_seed(0)
    whole = transformers.Gemma3ForConditionalGeneration(config).eval()
    directory = _saved(whole, tmp_path / "vlm")
    tokens = torch.arange(3, 40)

    model = loading.load(directory, torch.device("cpu")).base
    with torch.no_grad():
        expected = whole(input_ids=tokens[None]).logits[0]
        batch = model.training_batch(hf.bare(model), [len(tokens)], recompute=False)
        actual = hf.logits(model, batch.forward(tokens, save=False))

    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert lora.Layout(model.linears, lora.Shape(4)).size > 0


def test_a_model_without_a_usable_cache_is_said_to_have_none(tmp_path, caplog):
    caplog.set_level(logging.INFO, "tinkex.engine")
    base = hf.make_base(tmp_path / "base", "averaging")

    model = loading.load(str(base), torch.device("cpu")).base

    assert model.position_bytes is None
    assert "every token is sampled from the whole text" in caplog.text
