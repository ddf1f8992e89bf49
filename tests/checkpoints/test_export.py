"""Exporting a checkpoint: the files, the name of the base model, early errors."""

from __future__ import annotations

import io
import json
import sys
import tarfile

import pytest

import tinkex
from tests.support.fake_server import FakeServer, plugged_in
from tinkex import errors
from tinkex.checkpoints import export

PATH = "tinker://r1/sampler_weights/a"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def archive(**files):
    """A tar of these files; `__` in a name is a slash."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name.replace("__", "/"))
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def adapter(folder="", **more):
    """An adapter whose configuration names no base model, and other files."""
    prefix = f"{folder}__" if folder else ""
    own = {"adapter_config.json": b'{"r": 8, "base_model_name_or_path": null}', WEIGHTS: b"weights"}
    return archive(**{prefix + name: content for name, content in own.items()}, **more)


@pytest.fixture
def server():
    server = FakeServer()
    url = "http://training.test/api/v1/a.tar"
    server.stored["GET", "training_runs/r1/checkpoints/sampler_weights/a/archive"] = (
        200,
        {"url": url},
    )
    server.stored["POST", "weights_info"] = (200, {"base_model": "org/base", "lora_rank": 8})
    server.files["a.tar"] = adapter()
    return server


@pytest.fixture
def rest(server, monkeypatch):
    plugged_in(monkeypatch, server)
    with tinkex.RestClient() as rest:
        server.requests.clear()
        yield rest


def base_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_the_folder_is_an_adapter_and_nothing_else(rest, server, tmp_path):
    """The optimizer state is several times as large, and other programs cannot read it."""
    server.files["a.tar"] = adapter(**{"optimizer.safetensors": b"m", "checkpoint.json": b"{}"})
    folder = rest.export_checkpoint(PATH, tmp_path / "out")

    assert ["adapter_config.json", WEIGHTS] == sorted(path.name for path in folder.iterdir())
    assert b"weights" == (folder / WEIGHTS).read_bytes()
    assert ["out"] == [path.name for path in tmp_path.iterdir()]


def test_the_adapter_names_the_base_model_that_the_server_names(rest, tmp_path):
    """PEFT loads the base by that name."""
    assert "org/base" == base_of(rest.export_checkpoint(PATH, tmp_path / "out"))


def test_another_base_model_may_be_named(rest, server, tmp_path):
    """For example a folder on this machine; then the server is not asked."""
    folder = rest.export_checkpoint(PATH, tmp_path / "out", base_model="/models/base")

    assert "/models/base" == base_of(folder)
    assert [] == server.seen("weights_info")


def test_without_an_answer_of_the_server_the_name_in_the_adapter_is_kept(rest, server, tmp_path):
    server.lacks.add("weights_info")
    config = b'{"base_model_name_or_path": "its/own"}'
    server.files["a.tar"] = archive(**{"adapter_config.json": config, WEIGHTS: b""})

    assert "its/own" == base_of(rest.export_checkpoint(PATH, tmp_path / "out"))


def test_a_folder_around_the_adapter_is_removed(rest, server, tmp_path):
    """Some servers pack one."""
    server.files["a.tar"] = adapter("checkpoint-1__adapter")

    assert b"weights" == (rest.export_checkpoint(PATH, tmp_path / "o") / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    "content, message",
    [
        (archive(**{"model.bin": b""}), "is not a PEFT adapter .* contains model.bin"),
        (archive(), "contains nothing"),
        (archive(**{"adapter_config.json": b"{}"}), "contains adapter_config.json"),
        (
            archive(**{"adapter_config.json": b"[]", WEIGHTS: b""}),
            "not the configuration of an adapter",
        ),
        (
            archive(**{"adapter_config.json": b"{", WEIGHTS: b""}),
            "not the configuration of an adapter",
        ),
    ],
)
def test_other_content_is_an_error_and_leaves_nothing(rest, server, tmp_path, content, message):
    server.files["a.tar"] = content

    with pytest.raises(errors.DownloadError, match=message):
        rest.export_checkpoint(PATH, tmp_path / "out")
    assert [] == list(tmp_path.iterdir())


def test_an_existing_folder_is_not_replaced_without_force(rest, tmp_path):
    (tmp_path / "mine").write_text("mine")

    with pytest.raises(FileExistsError, match="choose another folder"):
        rest.export_checkpoint(PATH, tmp_path)
    assert b"weights" == (
        rest.export_checkpoint(PATH, tmp_path, force=True) / WEIGHTS
    ).read_bytes()  # fmt: skip


# Merging (engine/test_checkpoints.py and cli/test_command_line.py test the numbers)


def test_merging_without_the_extra_names_the_command(rest, server, tmp_path, monkeypatch):
    """Before gigabytes are downloaded."""
    monkeypatch.setitem(sys.modules, "tinkex.engine.checkpoints", None)

    with pytest.raises(errors.MissingExtraError, match=r"pip install 'tinkex\[local\]'"):
        rest.export_checkpoint(PATH, tmp_path / "out", merge=True)
    assert [] == server.seen("a.tar")


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "~/none", "a/b/c", ""])
def test_an_unknown_base_model_is_an_error(name):
    """The name may be a folder on the server's machine."""
    with pytest.raises(ValueError, match=r"is not a directory on this machine; give its directory"):
        export.resolve(name)


def test_a_hugging_face_model_is_taken_from_its_cache(tmp_path, monkeypatch):
    """Or downloaded; this test is offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--org--base" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--org--base" / "refs").mkdir()
    (tmp_path / "models--org--base" / "refs" / "main").write_text("0123")

    assert str(snapshot) == export.resolve("org/base")
    with pytest.raises(ValueError, match=r"cannot be downloaded .*give its directory"):
        export.resolve("org/other")
    assert "tiny" == export.resolve("tiny")
    assert str(tmp_path) == export.resolve(str(tmp_path))
