"""
Every family of both paths, against transformers and PEFT: one row each of `hf.CONFIGS`
(fast path) and `hf.GENERIC`.

A row is a small random model of the family's real configuration class. Run as a program with
--write, it copies the table of families into docs/models.md.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import attrs
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support import hf_reference as hf
from tinkex import types
from tinkex.engine import checkpoints, loading
from tinkex.engine.base_model import BaseModel
from tinkex.engine.configuration import Unsupported
from tinkex.engine.engine import Engine
from tinkex.engine.families import FAMILIES, build
from tinkex.engine.fast_path import FastModel

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
TABLE = re.compile(r"(?<=<!-- families -->\n).*?(?=<!-- end of families -->)", re.DOTALL)

PROMPT = np.random.default_rng(7).integers(0, 256, 30).tolist()


@attrs.frozen(eq=False)
class Case:
    """A model with an adapter, in our engine and in PEFT."""

    directory: Path
    adapter: Path
    engine: Engine
    reference: hf.Any

    @property
    def base(self) -> BaseModel:
        return self.engine._bases[str(self.directory)].base

    def scores(self, datum: types.Datum) -> np.ndarray:
        """Our log-probabilities of a datum."""
        pass_ = self.engine.forward_backward("m", [datum], "cross_entropy", None, forward_only=True)
        return hf.drive(pass_).loss_fn_outputs[0]["logprobs"].to_numpy()

    def sample(self, *, count: int, **params: hf.Any) -> list[types.SampledSequence]:
        """Continuations of `PROMPT` by the adapter."""
        settings = types.SamplingParams(max_tokens=24, seed=1, stop=[], **params)
        request = types.SampleRequest(
            types.ModelInput.from_ints(PROMPT), settings, num_samples=count
        )
        self.engine.submit_sample("ticket", "s", request)
        return hf.sample_all(self.engine)["ticket"].sequences


@pytest.fixture(scope="module", params=[*hf.CONFIGS, *hf.GENERIC])
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    directory = hf.make_base(folder / "base", request.param)
    adapter = hf.make_adapter(directory, folder / "adapter")
    engine = Engine(device="cpu", threads=1)
    engine.load_base(str(directory))
    engine.create_model("m", str(directory), types.LoraConfig(rank=8), seed=0, adapter=adapter)
    engine.open_sampler("s", str(directory), directory=adapter)
    return Case(directory, adapter, engine, hf.load_adapter(directory, adapter))


@torch.no_grad()
def test_logits_are_those_of_transformers(case):
    """Every feature that sets a family apart is computed exactly."""
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, hf.VOCAB, 100))
    expected = hf.load_base(case.directory)(input_ids=tokens[None]).logits[0]
    base = case.base

    training = base.training_batch(hf.bare(base), [100], recompute=False)
    actual = hf.logits(base, training.forward(tokens, save=False))

    # All numbers within grow with the embedding.
    scale = max(1.0, base.spec.embedding_scale) if isinstance(base, FastModel) else 1.0
    torch.testing.assert_close(actual, expected, atol=1e-5 * scale, rtol=1e-5)


def test_losses_and_gradients_are_those_of_peft(case, tmp_path):
    """The backward pass, on sequences of mixed lengths in one batch."""
    rng = np.random.default_rng(0)
    data = [hf.datum(rng.integers(0, hf.VOCAB, n + 1)) for n in (3, 40, 17, 18, 1, 90)]
    losses = []
    for datum in data:
        target = datum.loss_fn_inputs["target_tokens"].to_numpy()
        losses.append(-hf.logprobs(case.reference, datum.model_input.tokens, target).sum())
    total = torch.stack(losses).sum()
    total.backward()
    expected = hf.peft_gradients(case.reference)

    output = hf.drive(case.engine.forward_backward("m", data, "cross_entropy", None))
    actual = hf.gradients(case.engine, "m", tmp_path / "snapshot")

    assert output.loss == pytest.approx(total.item(), rel=1e-5)
    assert expected.keys() == actual.keys()
    # Rounding errors grow with depth: against float64, those of transformers are as large.
    is_deep = case.reference.config.num_hidden_layers > 2
    close = 1e-5 if isinstance(case.base, FastModel) and not is_deep else 1e-4
    for name in expected:
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=close * scale)


@pytest.mark.parametrize("count", [1, 3])
def test_sampled_logprobs_are_those_of_forward(case, count):
    """Of a single sample, and of several that share their prompt, beyond any window."""
    for sequence in case.sample(count=count):
        expected = case.scores(hf.datum(PROMPT + sequence.tokens))[len(PROMPT) - 1 :]

        np.testing.assert_allclose(sequence.logprobs, expected, atol=1e-4)


def test_the_likeliest_text_is_that_of_generate(case):
    [sequence] = case.sample(count=1, temperature=0.0)

    generated = case.reference.generate(
        input_ids=torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False, eos_token_id=None
    )

    assert generated[0, len(PROMPT) :].tolist() == sequence.tokens


def test_an_adapter_survives_saving_and_peft_computes_the_same(case, tmp_path):
    """Bit for bit when we load it; in PEFT, and merged into the base model, the same numbers."""
    saved = tmp_path / "saved"
    saved.mkdir()
    case.engine.save("m", saved, optimizer=False)
    original = load_file(case.adapter / "adapter_model.safetensors")
    tokens = np.random.default_rng(3).integers(0, hf.VOCAB, 60)
    ours = case.scores(hf.datum(tokens))

    checkpoints.merge_adapter(str(case.directory), saved, tmp_path / "merged")

    written = load_file(saved / "adapter_model.safetensors")
    assert {n for n in original if "lora_" in n} == set(written)
    assert all(torch.equal(original[name], written[name]) for name in written)
    for model in (hf.load_adapter(case.directory, saved), hf.load_base(tmp_path / "merged")):
        with torch.no_grad():
            theirs = hf.logprobs(model, tokens[:-1], tokens[1:]).numpy()
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def _gradient(directory: Path, dtype: str, folder: Path) -> torch.Tensor:
    """The gradient of an adapter, all in one vector."""
    engine = Engine(device="cpu", threads=1, dtype=dtype)
    engine.load_base(str(directory))
    adapter = folder / "adapter"
    engine.create_model("m", str(directory), types.LoraConfig(rank=8), seed=0, adapter=adapter)
    tokens = np.random.default_rng(0).integers(0, hf.VOCAB, 60)
    hf.drive(engine.forward_backward("m", [hf.datum(tokens)], "cross_entropy", None))
    return torch.cat([t.flatten() for t in hf.gradients(engine, "m", folder / dtype).values()])


@pytest.mark.parametrize("kind", ["granite", "olmo2", "gemma2", "gemma3"])
def test_gradients_in_bfloat16_point_where_those_in_float32_do(kind, tmp_path):
    """Norms, factors and caps keep their precision where everything else has 16 bits.

    transformers' own gradients in bfloat16 are at 0.994 (gemma3) to 0.9999 from its float32.
    """
    directory = hf.make_base(tmp_path / "base", kind)
    hf.make_adapter(directory, tmp_path / "adapter")

    exact, rounded = (_gradient(directory, dtype, tmp_path) for dtype in ("float32", "bfloat16"))

    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.98


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("gemma3", {"use_bidirectional_attention": True}, "attends to later tokens, too"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "has position embeddings of type 'dynamic', which change with the length of the text",
        ),
    ],
)
def test_what_a_family_does_not_compute_is_refused(kind, change, message, tmp_path):
    """With the reason, before weights are read."""
    directory = hf.make_base(tmp_path / "base", kind)
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))

    with pytest.raises(ValueError, match=message):
        Engine(device="cpu", threads=1).load_base(str(directory))


def test_a_family_with_another_activation_is_computed_by_transformers_modules(tmp_path):
    """The fast path has formulas of its own, with derivatives, for two."""
    directory = hf.make_base(tmp_path / "base", "llama")
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_act": "relu"}))
    tokens = torch.arange(3, 40)
    with torch.no_grad():
        expected = hf.load_base(directory)(input_ids=tokens[None]).logits[0]

        base = loading.load(str(directory), torch.device("cpu")).base
        batch = base.training_batch(hf.bare(base), [len(tokens)], recompute=False)
        actual = hf.logits(base, batch.forward(tokens, save=False))

    assert not isinstance(base, FastModel)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_a_rotary_embedding_of_a_part_of_each_head_is_not_taken_for_one_of_all():
    """Where a family rotates whole heads, the rest of the numbers would be rotated wrongly."""
    config = hf.config_of("llama")
    rotary = SimpleNamespace(inv_freq=torch.ones(2), attention_scaling=1.0)

    with pytest.raises(Unsupported, match="rotates 4 of the 8 numbers of a head"):
        build.ropes_of(FAMILIES["llama"], config, rotary, torch.device("cpu"))


def test_texts_of_longrope_end_at_the_original_context(tmp_path):
    """Beyond it, every position would be rotated by other angles."""
    directory = hf.make_base(tmp_path / "base", "phi3-longrope")
    engine = Engine(device="cpu", threads=1)
    engine.load_base(str(directory))

    assert 128 == engine.base_info(str(directory)).max_context_length


# -- the table on the page -------------------------------------------------------------------------


ROUTER = "training of the router, and its auxiliary loss"

#: Models of the generic path that are checked, as users know them, and what is not computed.
OTHERS = {
    "gpt_oss": ("gpt-oss", ROUTER),
    "qwen3_moe": ("Qwen 3 with experts", ROUTER),
    "mixtral": ("Mixtral", ROUTER),
    "qwen3_next": ("Qwen3-Next", ROUTER),
    "qwen3_5_text": ("Qwen 3.5 without experts", "-"),
    "gpt2": ("GPT-2", "-"),
    "gpt_neox": ("Pythia, GPT-NeoX", "-"),
    "falcon": ("Falcon 7B to 180B", "-"),
    "cohere2": ("Command R7B, Command A", "-"),
    "stablelm": ("StableLM 2", "-"),
    "deepseek_v3": ("DeepSeek-V3 and R1", ROUTER),
    "nemotron": ("Nemotron-4, Minitron", "-"),
    "averaging": ("made up in the test, for any architecture not named here", "-"),
}


def _by_type(configs: Mapping[str, hf.Any]) -> dict[str, str]:
    """Names of the configurations that are checked, by model_type."""
    rows: dict[str, list[str]] = {}
    for name, make in configs.items():
        rows.setdefault(make().model_type, []).append(name)
    return {model_type: ", ".join(names) for model_type, names in rows.items()}


def table() -> str:
    """The families, as docs/models.md shows them."""
    rows = _by_type(hf.CONFIGS)
    lines = ["", "| Family | Models | Path | Checked as | Not computed |", "|---|---|---|---|---|"]
    for model_type, family in FAMILIES.items():
        limits = family.limits or "-"
        lines.append(f"| {model_type} | {family.title} | fast | {rows[model_type]} | {limits} |")
    for model_type, checked in _by_type(hf.GENERIC).items():
        title, limits = OTHERS[model_type]
        lines.append(f"| {model_type} | {title} | generic | {checked} | {limits} |")
    return "\n".join([*lines, "", ""])


def test_the_page_has_the_table_of_families():
    """To update it: python tests/engine/test_families.py --write"""
    assert table() == TABLE.search(PAGE.read_text()).group()


if __name__ == "__main__" and "--write" in sys.argv:
    PAGE.write_text(TABLE.sub(lambda _: table(), PAGE.read_text()))
