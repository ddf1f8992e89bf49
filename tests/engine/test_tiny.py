"""The built-in model: always the same, unsure at first, and able to learn through LoRA alone."""

from __future__ import annotations

import json
import math

import numpy as np
import torch
from tokenizers import Tokenizer

from tests.support import hf_reference as hf
from tinkex import types
from tinkex.engine import tiny
from tinkex.engine.engine import Engine

TEXT = '''def tidy(path, *, keep=3):
    """Remove all but the newest files of a directory.

    The names of those removed are returned, oldest first.
    """
'''


def test_its_weights_are_always_the_same():
    """Checkpoints are of these weights; another draw would make them worthless."""
    one, two = tiny.weights(), tiny.weights()

    assert all(torch.equal(one[name], two[name]) for name in one)
    head = one["lm_head.weight"]
    np.testing.assert_allclose(head[0, :3], [0.0011914, 0.0028162, 0.0005199], rtol=1e-3)


def test_transformers_computes_the_same(tmp_path):
    """Its config.json describes it truly."""
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text(json.dumps(dict(tiny.CONFIG)))
    save_file(tiny.weights(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    tokens = np.arange(200)
    expected = hf.logprobs(hf.load_base(tmp_path), tokens[:-1], tokens[1:]).detach().numpy()
    engine = Engine(device="cpu", threads=1)
    engine.load_base("tiny")
    engine.create_model("m", "tiny", types.LoraConfig(), seed=0)

    output = hf.drive(
        engine.forward_backward("m", [hf.datum(tokens)], "cross_entropy", None, forward_only=True)
    )

    np.testing.assert_allclose(
        output.loss_fn_outputs[0]["logprobs"].to_numpy(), expected, atol=1e-4
    )


def test_any_text_survives_its_tokenizer():
    """Tokens are bytes; special tokens are distinguished from text."""
    tokenizer = Tokenizer.from_file(str(tiny.DIRECTORY / "tokenizer.json"))
    text = "naïve 🙂\n\tdef f(): ...  <|end|>"

    ids = tokenizer.encode(text).ids

    assert tiny.END == ids[-1]
    assert text.removesuffix("<|end|>").encode() == bytes(ids[:-1])
    assert text == tokenizer.decode(ids, skip_special_tokens=False)
    assert text.removesuffix("<|end|>") == tokenizer.decode(ids)
    assert tiny.VOCAB == tokenizer.get_vocab_size()


def test_it_is_unsure_at_first_and_learns():
    """From ln 512 a token; a text by heart in a few steps."""
    engine = Engine(device="cpu", threads=1)
    engine.load_base("tiny")
    engine.create_model("m", "tiny", types.LoraConfig(rank=32), seed=0)
    tokens = list(TEXT.encode())
    losses = []

    for _ in range(60):
        output = hf.drive(engine.forward_backward("m", [hf.datum(tokens)], "cross_entropy", None))
        losses.append(output.loss / (len(tokens) - 1))
        engine.optim_step("m", types.AdamParams(learning_rate=5e-3))

    assert abs(losses[0] - math.log(tiny.VOCAB)) < 0.2
    assert losses[-1] < 0.5


def test_the_tokenizer_files_are_what_the_module_makes():
    """They are read by the SDK, which has neither torch nor this module's dependencies."""
    for name, text in tiny.tokenizer_files().items():
        assert text == (tiny.DIRECTORY / name).read_text(encoding="utf-8")
