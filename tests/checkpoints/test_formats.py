"""Export formats: an entry of the table is all that a format needs."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from tinkex.checkpoints import card, export, formats
from tinkex.cli import cli


@pytest.mark.parametrize("name", formats.FORMATS)
def test_the_command_line_offers_every_format_and_describes_it(name):
    printed = " ".join(CliRunner().invoke(cli, ["export", "--help"]).output.split())

    assert f"{name}: {formats.FORMATS[name].help}." in printed


def test_a_new_format_is_written_and_described_by_its_entry(tmp_path, monkeypatch):
    """No other file has to name it."""

    def write(model, folder):
        folder.mkdir()
        (folder / "model.txt").write_text(model.name)

    plain = formats.Format("a text", "A model as text.", "cat {name}", "shell", "plain", write)
    monkeypatch.setitem(formats.FORMATS, "plain", plain)
    pytest.importorskip("torch")

    out = export.export_adapter(tmp_path, "tiny", tmp_path / "out", "plain", name="mine")

    assert "mine" == (out / "model.txt").read_text()
    readme = (out / export.CARD).read_text()
    assert "library_name: plain" in readme
    assert "A model as text. Fine-tuned from `tiny`" in readme
    assert "cat mine" in readme


def test_a_format_that_the_hub_does_not_know_has_no_library_name():
    assert "library_name" not in card.text("mine", "org/base", "gguf", None)


def test_an_unknown_format_is_named_with_the_known_ones(tmp_path):
    """Not a KeyError, and nothing is written."""
    with pytest.raises(ValueError, match="form must be one of peft, hf, gguf, got 'onnx'"):
        export.export_adapter(tmp_path, "tiny", tmp_path / "out", "onnx", name="mine")

    assert not (tmp_path / "out").exists()
