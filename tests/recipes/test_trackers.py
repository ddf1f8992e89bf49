"""
Trackers, with the real packages and offline: settings, metrics and the adapter arrive there.

TensorBoard is in the test requirements. The others are large and pin what we pin otherwise, so each
is installed into an environment of its own, by the slow tests.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import track_a_run
from tinkex import errors
from tinkex.recipes import trackers

ROOT = Path(__file__).parents[2]
#: What a run of track_a_run needs besides the tracker.
CORE = ["requests", "attrs", "numpy", "tokenizers", "tenacity", "protobuf", "tqdm", "click"]
PACKAGES = {
    "wandb": "wandb==0.31.0",
    "mlflow": "mlflow-skinny==3.17.2",
    "trackio": "trackio==0.43.0",
}
OFFLINE = {
    "wandb": {"WANDB_MODE": "offline", "WANDB_SILENT": "true"},
    "mlflow": {"MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_TRACKING_URI": "file://{folder}/mlruns"},
    "trackio": {"TRACKIO_DIR": "{folder}/trackio"},
}


def test_a_tracker_is_a_module_of_its_name():
    """The table "Where do I change" promises that a new one is one file."""
    assert ["mlflow", "tensorboard", "trackio", "wandb"] == trackers.names()


def test_an_unknown_tracker_is_named():
    with pytest.raises(ValueError, match="there is no tracker 'comet'; there are mlflow, tensorbo"):
        trackers.create(["tensorboard", "comet"])


@pytest.mark.parametrize(
    ("name", "module"),
    [("tensorboard", "tensorboard.compat.proto"), ("wandb", "wandb"), ("mlflow", "mlflow")],
)
def test_a_tracker_that_is_not_installed_is_named(name, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)

    with pytest.raises(errors.MissingExtraError, match=rf"the tracker {name} needs the package "):
        trackers.create([name])


def test_whatever_a_package_raises_at_the_start_is_one_sentence(monkeypatch):
    class Refusing:
        def __init__(self):
            raise RuntimeError("no database\nat all")

    monkeypatch.setattr("tinkex.recipes.trackers.tensorboard.Tracker", Refusing)

    with pytest.raises(ValueError, match="tracker tensorboard cannot be used: no database at all"):
        trackers.create(["tensorboard"])


def test_tensorboard_shows_the_curves_the_settings_and_the_samples(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing import event_accumulator

    from tinkex.text import tokenizer

    monkeypatch.setattr(tokenizer, "load", tokenizer.load)  # track_a_run replaces it

    run = track_a_run.train("tensorboard", tmp_path)

    found = event_accumulator.EventAccumulator(str(run.folder / "tensorboard"))
    found.Reload()
    losses = {event.step: event.value for event in found.Scalars("train_loss")}
    expected = {row["step"]: row["train_loss"] for row in run.metrics if "train_loss" in row}
    assert pytest.approx(expected, rel=1e-6) == losses
    assert {*range(11)} == {event.step for event in found.Scalars("eval_loss")}
    texts = {
        tag: found.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
        for tag in found.Tags()["tensors"]
    }
    assert 0.5 == json.loads(texts["settings"])["learning_rate"]
    assert "adapter (tinker://" in texts["adapter"]
    assert texts["samples/0"].startswith("one\n")


@pytest.fixture(scope="module")
def python_with(tmp_path_factory):
    """The Python of an environment with one tracker."""

    @functools.cache
    def python_with(name):
        folder = tmp_path_factory.mktemp(name)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = folder / "bin" / "python"
        install = [python, "-m", "pip", "install", "--quiet", PACKAGES[name], *CORE]
        subprocess.run(install, check=True, capture_output=True)
        return python

    return python_with


def environment(name, folder, **more):
    kept = {key: value for key, value in os.environ.items() if not key.startswith("TINKER_")}
    told = {key: value.format(folder=folder) for key, value in OFFLINE[name].items()}
    return {**kept, **told, "HOME": str(folder), "PYTHONPATH": str(ROOT), **more}


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKAGES)
def test_a_run_arrives_at_the_tracker(name, python_with, tmp_path):
    """Also in two parts: a resumed run continues its curves rather than beginning others."""
    done = subprocess.run(
        [python_with(name), "-m", "tests.support.track_a_run", name, str(tmp_path)],
        env=environment(name, tmp_path),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )

    assert 0 == done.returncode, done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("ARRIVED ")]
    CHECKS[name](json.loads(line.removeprefix("ARRIVED ")))


def check_by_step(arrived):
    assert 0.5 == arrived["config"]["learning_rate"]
    assert {str(step) for step in range(11)} <= set(arrived["steps"])
    assert all("train_loss" in arrived["steps"][str(step)] for step in range(1, 11))
    assert arrived["steps"]["10"]["eval_loss"] < arrived["steps"]["0"]["eval_loss"] / 2
    assert 1 == len(arrived["runs"])


def check_wandb(arrived):
    check_by_step(arrived)
    assert ["model", ["adapter_model.npy"]] in arrived["artifacts"]


def check_trackio(arrived):
    check_by_step(arrived)
    assert ["run-adapter", "model"] in arrived["artifacts"]


def check_mlflow(arrived):
    assert "0.5" == arrived["config"]["learning_rate"]
    assert {*range(1, 11)} == {step for step, _ in arrived["steps"]["train_loss"]}
    losses = dict(arrived["steps"]["eval_loss"])
    assert losses[10] < losses[0] / 2
    assert ["adapter/adapter_model.npy"] == arrived["artifacts"]
    assert "samples/step-000010.json" in arrived["samples"]
    assert "FINISHED" == arrived["status"]


CHECKS = {"wandb": check_wandb, "mlflow": check_mlflow, "trackio": check_trackio}


@pytest.mark.slow
def test_without_a_key_wandb_is_refused_rather_than_asked_for(python_with, tmp_path):
    code = "from tinkex.recipes import trackers; trackers.create(['wandb'])"

    done = subprocess.run(
        [python_with("wandb"), "-c", code],
        env=environment("wandb", tmp_path, WANDB_MODE="online", WANDB_API_KEY=""),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )

    assert "the tracker wandb is not logged in; run `wandb login`" in done.stderr
