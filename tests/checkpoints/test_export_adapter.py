"""A trained adapter for other programs: each form says the same as we do."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers

from tests.support import hf_reference as hf
from tinkex import cli, types
from tinkex.checkpoints import card, export
from tinkex.engine import gguf_writer
from tinkex.engine.engine import Engine

PROMPT = [10, 20, 30, 40, 50]
TOKENS = 12


@pytest.fixture
def trained(tmp_path):
    """A base model, an adapter in PEFT's format with random weights, and what it says greedily."""
    base = hf.make_base(tmp_path / "base", "llama")
    adapter = hf.make_adapter(base, tmp_path / "adapter")
    return base, adapter, ours(str(base), adapter)


def ours(base, adapter=None):
    """The likeliest tokens after PROMPT, by our engine."""
    engine = Engine(device="cpu", threads=1)
    engine.load_base(base)
    engine.open_sampler("s", base, directory=adapter)
    params = types.SamplingParams(max_tokens=TOKENS, temperature=0.0)
    request = types.SampleRequest(
        prompt=types.ModelInput.from_ints(PROMPT),
        sampling_params=params,
        num_samples=1,
        sampling_session_id="s",
    )
    engine.submit_sample("t", "s", request)
    [response] = hf.sample_all(engine).values()
    return list(response.sequences[0].tokens)


def theirs(model):
    """The same by transformers."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor([PROMPT]), max_new_tokens=TOKENS, do_sample=False, pad_token_id=260
        )
    return out[0][len(PROMPT) :].tolist()


def test_peft_and_transformers_say_the_same_of_the_adapter(trained, tmp_path):
    base, adapter, expected = trained

    out = export.export_adapter(adapter, str(base), tmp_path / "out", "peft", name="out")

    assert expected == theirs(hf.load_adapter(base, out))
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} == {
        path.name for path in out.iterdir()
    }
    named = json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert str(base) == named


def test_transformers_says_the_same_of_the_merged_directory(trained, tmp_path):
    base, adapter, expected = trained

    out = export.export_adapter(adapter, str(base), tmp_path / "out", "hf", name="out")

    assert expected == theirs(hf.load_base(out))


def test_a_gguf_file_says_the_same(trained, tmp_path):
    base, adapter, expected = trained

    out = export.export_adapter(
        adapter, str(base), tmp_path / "out", "gguf", name="mine", gguf_type="F32"
    )

    assert expected == ours(str(out / "mine.gguf"))
    reread = transformers.AutoModelForCausalLM.from_pretrained(
        out, gguf_file="mine.gguf", dtype=torch.float32
    )
    assert expected == theirs(reread.eval())


def test_an_adapter_of_a_gguf_file_is_merged_into_a_directory(trained, tmp_path):
    base, adapter, _ = trained
    gguf_writer.write(base, tmp_path / "base.gguf", "F32")

    out = export.export_adapter(
        adapter, str(tmp_path / "base.gguf"), tmp_path / "out", "hf", name="out"
    )

    assert (out / "tokenizer.json").is_file()
    config = json.loads((out / "config.json").read_text())
    assert "llama" == config["model_type"]


def test_a_folder_that_is_not_empty_is_left_alone(trained, tmp_path):
    base, adapter, _ = trained
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")

    with pytest.raises(FileExistsError, match="already exists"):
        export.export_adapter(adapter, str(base), tmp_path / "out", "hf", name="out")

    assert ["mine"] == [path.name for path in (tmp_path / "out").iterdir()]


def test_the_card_names_base_data_settings_and_losses():
    training = card.Training("abc123", 15, {"rank": 16, "max_steps": None}, (0.8, 0.1))

    text = card.text("mine", "org/base", "gguf", training)

    assert "base_model: org/base" in text
    assert "| Held-out loss per token | 0.8000 before, 0.1000 after |" in text
    assert "| SHA-256 of the data | `abc123` |" in text
    assert "| rank | 16 |" in text
    assert "max_steps" not in text
    assert "llama-cli -m mine.gguf" in text


def test_the_command_exports_a_finished_run(trained, tmp_path, capsys):
    base, adapter, _ = trained
    run = tmp_path / "run"
    run.mkdir()
    adapter.rename(run / "adapter")
    state = {
        "settings": {"base_model": str(base), "rank": 8},
        "data": "data.jsonl",
        "data_sha256": "abc123",
        "total_steps": 3,
        "step": 3,
        "sampler_path": "tinker://r/sampler_weights/final",
    }
    (run / "state.json").write_text(json.dumps(state))
    rows = [{"step": 0, "eval_loss": 2.0}, {"step": 3, "eval_loss": 1.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    status = cli.main(["export", str(run), str(tmp_path / "mine"), "--to", "gguf"])

    assert 0 == status
    assert str(tmp_path / "mine" / "mine.gguf") in capsys.readouterr().out
    text = (tmp_path / "mine" / "README.md").read_text()
    assert "2.0000 before, 1.0000 after" in text
    assert "| Steps | 3 |" in text
    assert np.isfinite(ours(str(tmp_path / "mine" / "mine.gguf"))).all()


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert 2 == cli.main(["export", str(tmp_path), str(tmp_path / "out")])

    assert "neither the folder of a run nor a tinker:// path" in capsys.readouterr().err
