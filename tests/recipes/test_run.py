"""A run as its folder describes it."""

from __future__ import annotations

import json

import pytest

import tinkex

STATE = {
    "settings": {"base_model": "tiny", "rank": 4},
    "step": 2,
    "total_steps": 4,
    "checkpoint": "tinker://m/weights/step-000002",
    "sampler_path": None,
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "state.json").write_text(json.dumps(STATE))
    rows = [{"step": 0, "eval_loss": 5.5}, {"step": 1, "train_loss": 5.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_a_run_is_what_its_folder_says(folder):
    run = tinkex.load_run(folder)

    assert (2, 4, False) == (run.step, run.total_steps, run.is_finished)
    assert ("tiny", 4) == (run.base_model, run.settings["rank"])
    assert "tinker://m/weights/step-000002" == run.checkpoint
    assert f"<Run {folder} [saved after step 2 of 4]>" == repr(run)
    assert [0, 1] == [row["step"] for row in run.metrics]


def test_a_run_follows_its_folder_while_it_trains(folder):
    run = tinkex.load_run(folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "train_loss": 4.0}\n{"step": 4, "tra')

    assert 3 == run.step


def test_metrics_become_a_data_frame(folder):
    frame = tinkex.load_run(folder).metrics.to_pandas()

    assert ["step", "eval_loss", "train_loss"] == list(frame.columns)
    assert 5.0 == frame["train_loss"][1]


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no run in .*: it has no state\.json"):
        tinkex.load_run(tmp_path)


def test_a_broken_state_is_named(tmp_path):
    (tmp_path / "state.json").write_text("{")

    with pytest.raises(ValueError, match=r"state\.json cannot be read"):
        tinkex.load_run(tmp_path)
