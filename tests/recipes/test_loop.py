"""
What a run is asked for beyond its steps: early stopping, pruned checkpoints, samples, accumulation.
"""

from __future__ import annotations

import itertools
import json
import logging
from contextlib import contextmanager
from types import SimpleNamespace

import attrs
import numpy as np
import pytest

from tests.support.fake_service import FakeService
from tinkex import errors, types
from tinkex.data import files
from tinkex.recipes import loop, run_folder, supervised
from tinkex.recipes.callbacks import Callbacks
from tinkex.recipes.settings import Settings

SETTINGS = Settings(
    "fake", learning_rate=0.5, batch_size=4, epochs=4, eval_fraction=0.2, save_every=2, eval_every=2
)


class Silent:
    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)

    def rendered(self, done, total): ...

    def begin(self, step, total_steps): ...

    def row(self, row): ...

    def end(self): ...


class Recording:
    """A callback that notes every event."""

    def __init__(self):
        self.events = []

    def __getattr__(self, name):
        if not name.startswith("on_"):
            raise AttributeError(name)
        return lambda *values: self.events.append((name, *values[1:]))

    def __dir__(self):
        return ["on_start", "on_step", "on_eval", "on_save", "on_sample", "on_end"]

    def of(self, name):
        return [values for event, *values in self.events if event == name]


@pytest.fixture
def data(tmp_path):
    """25 examples: 20 to train on in 5 steps an epoch, 5 held out."""
    path = tmp_path / "data.jsonl"
    lines = [json.dumps({"prompt": f"{i}", "completion": "abab" * (i + 1)}) for i in range(25)]
    path.write_text("\n".join(lines))
    return files.read(path)


@pytest.fixture
def run(data, tmp_path):
    def run(name="run", service=None, settings=SETTINGS, report=None, callbacks=(), **options):
        folder = tmp_path / name
        return supervised.run(
            service or FakeService(),
            data,
            settings,
            folder,
            report or Silent(),
            run_folder.load_state(folder),
            callbacks=Callbacks(callbacks),
            **options,
        )

    return run


def rows(folder):
    return run_folder.read_rows(folder / "metrics.jsonl")


def adapter(folder):
    return np.load(folder / "adapter" / "adapter_model.npy")


class Overfitting(FakeService):
    """The held-out loss falls for some evaluations, and rises from then on."""

    def __init__(self, falls_until):
        super().__init__()
        self.falls_until = falls_until

    def create_lora_training_client(self, *args, **kwargs):
        return self.overfit(super().create_lora_training_client(*args, **kwargs))

    def create_training_client_from_state_with_optimizer(self, path):
        made = super().create_training_client_from_state_with_optimizer(path)
        return self.overfit(made, int(path[-6:]))

    def overfit(self, training, step=0):
        forward, optim_step = training.forward, training.optim_step
        steps = [step]

        def counting(params):
            steps[0] += 1
            return optim_step(params)

        def forward_worse(data, loss_fn):
            future = forward(data, loss_fn)
            loss = 1 + abs(steps[0] - self.falls_until)
            for out, datum in zip(future.result().loss_fn_outputs, data):
                out["logprobs"] = types.TensorData(
                    np.full(datum.model_input.length, -loss, np.float32)
                )
            return future

        training.forward, training.optim_step = forward_worse, counting
        return training


PATIENT = attrs.evolve(SETTINGS, patience=2)


def test_a_run_without_progress_ends_early_with_the_best_weights(run, tmp_path):
    """Best at step 4; 6 and 8 are worse: the run ends, whatever was submitted after 8."""
    service, report = Overfitting(4), Silent()

    outcome = run(service=service, settings=PATIENT, report=report)

    assert 8 == rows(tmp_path / "run")[-1]["step"]
    assert {"step": 4, "eval_loss": 1.0} == {
        key: outcome.state.best[key] for key in ("step", "eval_loss")
    }
    best = service.checkpoints[outcome.state.best["path"]][0]
    assert best.tobytes() == adapter(tmp_path / "run").tobytes()
    assert (
        "The held-out loss has not fallen for 2 evaluations; the run ends with the weights of "
        "step 4 (loss 1.0000)."
    ) in report.said


@pytest.mark.parametrize("questions", range(2, 20))
def test_an_early_end_is_the_same_after_any_stop(run, tmp_path, questions):
    @contextmanager
    def guard():
        count = itertools.count(1)
        yield lambda: next(count) >= questions

    run("whole", service=Overfitting(4), settings=PATIENT)
    service = Overfitting(4)
    run(service=service, settings=PATIENT, guard=guard)
    run(service=service, settings=PATIENT)

    assert adapter(tmp_path / "whole").tobytes() == adapter(tmp_path / "run").tobytes()
    assert [r["step"] for r in rows(tmp_path / "whole")] == [
        r["step"] for r in rows(tmp_path / "run")
    ]


def test_a_run_can_end_with_its_best_weights_without_ending_early(run, tmp_path):
    service = Overfitting(6)

    outcome = run(service=service, settings=attrs.evolve(SETTINGS, load_best=True, save_every=99))

    assert 20 == rows(tmp_path / "run")[-1]["step"]
    assert 6 == outcome.state.best["step"]
    best = service.checkpoints[outcome.state.best["path"]][0]
    assert best.tobytes() == adapter(tmp_path / "run").tobytes()


def test_old_checkpoints_are_deleted_but_the_best_stays(run):
    service = Overfitting(6)

    outcome = run(service=service, settings=attrs.evolve(SETTINGS, keep=2))

    kept = [step for step, _ in outcome.state.checkpoints]
    assert [6, 18, 20] == kept
    states = sorted(path for path in service.checkpoints if "/weights/" in path)
    assert sorted(path for _, path in outcome.state.checkpoints) == states


def test_a_checkpoint_that_cannot_be_deleted_does_not_end_the_run(run, caplog):
    class Keeping(FakeService):
        def delete_checkpoint_from_tinker_path(self, path):
            raise errors.NotOfferedError("this server deletes nothing", status=404)

    with caplog.at_level(logging.WARNING, "tinkex"):
        outcome = run(service=Keeping(), settings=attrs.evolve(SETTINGS, keep=1))

    assert outcome.state.is_finished
    assert "could not be deleted: this server deletes nothing" in caplog.text


def test_batches_that_accumulate_are_one_larger_batch(run, tmp_path):
    """The mean is over the tokens of the step, so their losses and weights are equal."""
    run("large", settings=attrs.evolve(SETTINGS, batch_size=10, learning_rate=0.01))
    settings = attrs.evolve(SETTINGS, batch_size=5, gradient_accumulation=2, learning_rate=0.01)
    run("accumulated", settings=settings)

    losses = [
        [row["train_loss"] for row in rows(tmp_path / name) if "train_loss" in row]
        for name in ("large", "accumulated")
    ]
    assert pytest.approx(losses[0]) == losses[1]
    assert pytest.approx(adapter(tmp_path / "large")) == adapter(tmp_path / "accumulated")


def test_the_optimizer_gets_what_the_settings_say(run):
    service = FakeService()

    run(
        service=service,
        settings=attrs.evolve(
            SETTINGS, weight_decay=0.1, beta1=0.8, beta2=0.99, grad_clip_norm=1.5, max_steps=1
        ),
    )

    [params] = service.steps
    assert (0.1, 0.8, 0.99, 1.5) == (
        params.weight_decay,
        params.beta1,
        params.beta2,
        params.grad_clip_norm,
    )


SAMPLING = attrs.evolve(SETTINGS, prompts=["one", "two"], generate_every=5)


def test_samples_are_taken_as_training_goes(run, tmp_path):
    recording = Recording()

    run(settings=SAMPLING, callbacks=[recording])

    found = run_folder.read_rows(tmp_path / "run" / "samples.jsonl")
    assert [0, 0, 5, 5, 10, 10, 15, 15, 20, 20] == [row["step"] for row in found]
    assert ["one", "two"] == [row["prompt"] for row in found[:2]]
    assert "\0" * 8 == found[0]["text"]
    assert found[-1]["text"] in ("aaaaaaaa", "bbbbbbbb")
    assert [0, 5, 10, 15, 20] == [samples[0].step for [samples] in recording.of("on_sample")]


@pytest.mark.parametrize("questions", range(2, 40, 3))
def test_each_sample_is_taken_once_whenever_a_run_is_stopped(run, tmp_path, questions):
    @contextmanager
    def guard():
        count = itertools.count(1)
        yield lambda: next(count) >= questions

    service = FakeService()
    run(service=service, settings=SAMPLING, guard=guard)
    run(service=service, settings=SAMPLING)

    found = run_folder.read_rows(tmp_path / "run" / "samples.jsonl")
    assert [0, 0, 5, 5, 10, 10, 15, 15, 20, 20] == [row["step"] for row in found]


def test_callbacks_see_everything_in_order(run):
    recording = Recording()

    run(settings=attrs.evolve(SETTINGS, max_steps=2), callbacks=[recording])

    names = [name for name, *_ in recording.events]
    assert [
        "on_start", "on_eval", "on_step", "on_step", "on_eval", "on_save", "on_save",
    ] == names  # fmt: skip
    [[first], [second]] = recording.of("on_eval")
    assert {"step", "eval_loss"} == set(first) == set(second)
    [[row], _] = recording.of("on_step")
    assert {"step", "train_loss", "tokens_per_second", "learning_rate"} == set(row)
    [[state], [sampler]] = recording.of("on_save")
    assert ("state", 2, None) == (state.kind, state.step, state.adapter)
    assert "sampler" == sampler.kind and sampler.adapter.endswith("adapter")


def test_the_speed_does_not_jump_where_results_arrive_together(run, monkeypatch, tmp_path):
    """Every other step seems to take a thousandth of the one before it."""
    ticks = itertools.cycle([1.0, 0.001])
    now = [0.0]

    def monotonic():
        now[0] += next(ticks)
        return now[0]

    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=monotonic))
    run(settings=attrs.evolve(SETTINGS, max_steps=12, eval_fraction=0.0))

    rows = run_folder.read_rows(tmp_path / "run" / "metrics.jsonl")
    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row][1:]
    assert 3 > max(speeds) / min(speeds)


def test_a_callback_that_fails_does_not_end_the_run(run):
    class Failing:
        def on_step(self, run, row):
            raise ValueError("broken")

    assert run(callbacks=[Failing()]).state.is_finished
