"""`tinkex.finetune`: whatever the data is, the same run as `tinkex train`."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest

import tinkex
from tests.support.fake_service import FakeService
from tinkex import cli, errors, types
from tinkex.recipes import config_file, given_data, run_folder
from tinkex.text import tokenizer

ROWS = [{"prompt": f"{i}", "completion": "abab" * (i + 1)} for i in range(25)]
SETTINGS = {"learning_rate": 0.5, "batch_size": 4, "epochs": 2, "eval_fraction": 0.2}


@pytest.fixture(autouse=True)
def service(monkeypatch):
    def no_tokenizer(identifier):
        raise errors.TokenizerError(f"{identifier} is only known to the fake server")

    monkeypatch.setattr(tokenizer, "load", no_tokenizer)
    return FakeService()


@pytest.fixture
def finetune(service, tmp_path):
    def finetune(data=ROWS, name="run", **options):
        options = {"base_model": "fake", "service": service, "progress": False, **options}
        return tinkex.finetune(data, output=tmp_path / name, **{**SETTINGS, **options})

    return finetune


def weights(run):
    return np.load(run.folder / "adapter" / "adapter_model.npy").tobytes()


def test_one_call_trains_evaluates_and_leaves_an_adapter(finetune):
    run = finetune()

    assert run.is_finished and run.adapter.is_dir()
    losses = [row["eval_loss"] for row in run.metrics if "eval_loss" in row]
    assert losses[-1] < losses[0] / 2
    assert 10 == run.step == run.total_steps
    assert "<svg" in run.plot().svg
    assert len(run.metrics) == len(run.metrics.to_pandas())


def as_frame(rows):
    import pandas

    return pandas.DataFrame(rows)


def as_data_set(rows):
    import datasets

    return datasets.Dataset.from_list(rows)


@pytest.mark.parametrize("form", [iter, as_frame, as_data_set], ids=["iterator", "frame", "hub"])
def test_rows_in_any_form_are_the_same_run(finetune, form):
    assert weights(finetune()) == weights(finetune(form(ROWS), "other"))


def test_a_path_is_the_same_run(finetune, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    assert weights(finetune()) == weights(finetune(path, "other"))


def datums():
    """What the rows are after rendering: 256 begins, 257 ends; the prompt does not count."""
    for row in ROWS:
        prompt, completion = row["prompt"].encode(), row["completion"].encode()
        tokens = [256, *prompt, *completion, 257]
        weights = [0] * len(prompt) + [1] * (len(completion) + 1)
        yield types.Datum(
            types.ModelInput.from_ints(tokens[:-1]),
            {"target_tokens": np.array(tokens[1:]), "weights": np.array(weights, np.float32)},
        )


def test_datums_are_trained_as_they_are(finetune):
    assert weights(finetune()) == weights(finetune(datums(), "other"))


def test_a_datum_that_is_no_text_is_named(finetune):
    good, bad = (
        types.Datum(types.ModelInput.from_ints([1, 2]), {"target_tokens": np.array([2, 3])}),
        types.Datum(types.ModelInput.from_ints([1, 2]), {"target_tokens": np.array([7, 3])}),
    )

    with pytest.raises(ValueError, match="target_tokens of datum 1 are not its tokens shifted by"):
        finetune([good, bad])


# Stopping, resuming, failing


def press_ctrl_c_at(service, operation):
    left = [operation]

    def on_operation(name):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)

    service.on_operation = on_operation


def test_ctrl_c_saves_and_the_same_call_with_resume_continues(finetune, service):
    whole = finetune(name="whole")
    press_ctrl_c_at(service, 20)

    with pytest.raises(KeyboardInterrupt, match="call finetune again with resume=True"):
        finetune()
    assert signal.default_int_handler is signal.getsignal(signal.SIGINT)
    run = finetune(resume=True)

    assert weights(whole) == weights(run)


def test_the_command_line_resumes_a_run_of_finetune(finetune, service, tmp_path, monkeypatch):
    whole = finetune(name="whole")
    press_ctrl_c_at(service, 20)
    with pytest.raises(KeyboardInterrupt):
        finetune()
    monkeypatch.setattr(tinkex, "ServiceClient", lambda *args, **kwargs: service)

    assert 0 == cli.main(["train", "--resume", "--output", str(tmp_path / "run")])
    assert weights(whole) == weights(tinkex.load_run(tmp_path / "run"))


def test_resume_starts_a_run_that_is_not_there_and_returns_one_that_is_finished(finetune, service):
    first = finetune(resume=True)
    operations = len(service.steps)
    again = finetune(resume=True)

    assert first.sampler_path == again.sampler_path
    assert operations == len(service.steps)


def test_a_run_is_not_overwritten(finetune):
    first = finetune()

    with pytest.raises(ValueError, match=r"already contains a run \(finished\).*resume"):
        finetune()
    assert tinkex.load_run(first.folder).is_finished


def test_other_data_does_not_resume_and_does_no_harm(finetune, service):
    press_ctrl_c_at(service, 20)
    with pytest.raises(KeyboardInterrupt):
        finetune()
    with pytest.raises(ValueError, match="the data differs from that of the run to resume"):
        finetune(ROWS[:-1], resume=True)
    with pytest.raises(ValueError, match=r"^rank is 5, but the run to resume has 32"):
        finetune(rank=5, resume=True)

    assert finetune(resume=True).is_finished


def test_a_dead_engine_is_started_again_from_the_last_checkpoint(finetune, service):
    whole = finetune(name="whole")
    seen = []

    class Seeing(tinkex.Callback):
        def on_restart(self, run, reason):
            seen.append((run.step, reason))

    def die(name, left=[20]):  # noqa: B006 - counts
        left[0] -= 1
        if left[0] == 0:
            raise errors.EngineError("the engine died.")

    service.on_operation = die
    run = finetune(callbacks=[Seeing()], save_every=1)

    assert weights(whole) == weights(run)
    assert [(pytest.approx(4, abs=4), "the engine died.")] == seen


def test_the_end_is_reported_once_however_it_comes(finetune, service):
    ends = []

    class Ends(tinkex.Callback):
        def on_end(self, run, end):
            ends.append((end.status, end.error))

    def fail(name):
        if name == "save_state":
            raise errors.InternalServerError("disk full", status=500)

    finetune(callbacks=[Ends()])
    service.on_operation = fail
    with pytest.raises(errors.InternalServerError):
        finetune(name="failing", callbacks=[Ends()])
    press_ctrl_c_at(service, 9)
    with pytest.raises(KeyboardInterrupt):
        finetune(name="stopping", callbacks=[Ends()])

    assert [("finished", ""), ("failed", "disk full"), ("stopped", "")] == ends


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learnig_rate": 1}, "there is no setting learnig_rate; did you mean learning_rate"),
        ({"base_model": None}, "^Missing base_model"),
        ({"data": None}, "Missing DATA"),
        ({"report_to": "tensorbord"}, "there is no tracker 'tensorbord'; there are mlflow"),
        ({"base_url": "http://x"}, "give either service, or base_url"),
        ({"data": [{"chosen": "a", "rejected": "b", "prompt": "c"}]}, "preference pair"),
    ],
)
def test_bad_arguments_leave_no_folder_behind(finetune, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        finetune(**options)
    assert [] == list(tmp_path.iterdir())


PAIR = {"chosen": "a", "rejected": "b", "prompt": "c"}


@pytest.mark.parametrize(
    "options", [{"data": [PAIR]}, {"max_length": 1}, {"method": "dpo"}, {"eval_data": [PAIR]}]
)
def test_refused_data_leaves_a_folder_as_it_was(finetune, tmp_path, options):
    """Whatever was found out too late to refuse it before anything was written."""
    folder = tmp_path / "run"
    folder.mkdir()
    files = {"data.jsonl": "of a run that never began", "notes.txt": "of the user"}
    for name, text in files.items():
        (folder / name).write_text(text)

    with pytest.raises(ValueError):
        finetune(**options)

    assert files == {path.name: path.read_text() for path in folder.iterdir()}


def test_a_folder_in_use_is_named(finetune, tmp_path):
    with run_folder.locked(tmp_path / "run"), pytest.raises(ValueError, match="is in use by proc"):
        finetune()


def test_what_is_no_data_is_named(finetune):
    with pytest.raises(TypeError, match="rows must be a list of dicts, got int"):
        finetune(5)


def test_prompts_come_from_a_file_or_a_list(finetune, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text('What is\n\n{"prompt": "Why?\\nHow?"}\n')

    run = finetune(prompts=path, generate_every=10)

    assert ["What is", "Why?\nHow?"] == [row["prompt"] for row in run.samples[:2]]
    for text, message in (('{"text": 1}', 'line 1 has no "prompt"'), ("", "has no prompts")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            given_data.read_prompts(path)


# Configuration


def test_the_config_of_a_run_starts_the_same_run(finetune, service, tmp_path, monkeypatch):
    first = finetune(weight_decay=0.1, prompts=["a: b"])
    monkeypatch.setattr(tinkex, "ServiceClient", lambda *args, **kwargs: service)
    config = str(first.folder / "config.yaml")

    assert 0 == cli.main(["train", "--config", config, "--output", str(tmp_path / "again")])

    again = tinkex.load_run(tmp_path / "again")
    assert weights(first) == weights(again)
    assert first.settings == again.settings
    assert {"data", "base_model", "weight_decay"} <= set(
        config_file.read(first.folder / "config.yaml")
    )
