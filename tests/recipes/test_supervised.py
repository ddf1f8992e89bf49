"""
The fine-tuning loop, against a model that really learns (fake_service.py).
"""

from __future__ import annotations

import itertools
import json
from contextlib import contextmanager, nullcontext
from pathlib import Path

import attrs
import numpy as np
import pytest

from tests.support.fake_service import ByteTokenizer, FakeService
from tinkex import errors, types
from tinkex.data import datums, files, records
from tinkex.recipes import loop, run_folder, supervised
from tinkex.recipes.settings import Settings

SETTINGS = Settings(
    "fake", learning_rate=0.5, batch_size=4, epochs=2, eval_fraction=0.2, save_every=3, eval_every=4
)


class Silent:
    """A Report that keeps what it receives."""

    def __init__(self):
        self.said, self.rows = [], []

    def say(self, text):
        self.said.append(text)

    def rendered(self, done, total):
        pass

    def begin(self, step, total_steps):
        pass

    def row(self, row):
        self.rows.append(row)

    def end(self):
        pass


@pytest.fixture
def data(tmp_path):
    """25 examples: 20 to train on in 5 steps an epoch, 5 held out."""
    path = tmp_path / "data.jsonl"
    lines = [json.dumps({"prompt": f"{i}", "completion": "abab" * (i + 1)}) for i in range(25)]
    path.write_text("\n".join(lines))
    return files.read(path)


@pytest.fixture
def run(data, tmp_path, monkeypatch):
    """Run into tmp_path/<name>; resuming from its state, if it has one."""
    monkeypatch.setattr(supervised, "EVALUATED_AT_ONCE", 2)

    def run(name="run", service=None, settings=SETTINGS, report=None, data=data, **options):
        folder = tmp_path / name
        state = run_folder.load_state(folder)
        service, report = service or FakeService(), report or Silent()
        return supervised.run(service, data, settings, folder, report, state, **options)

    return run


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_speed(rows):
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


def adapter(folder):
    return np.load(folder / "adapter" / "adapter_model.npy").tobytes()


class Killed(BaseException):
    """What kill -9 would do here: nothing after it runs, no except clause of ours sees it."""


def killed_after(operations):
    """A hook that ends the run, as hard as a test can, at the given operation."""
    left = itertools.count(operations - 1, -1)

    def on_operation(name):
        if next(left) == 0:
            raise Killed

    return on_operation


# A whole run


def test_the_loss_falls_and_the_adapter_is_there(run, tmp_path):
    outcome = run()

    before, after = outcome.losses
    assert after < before / 2
    assert outcome.adapter == tmp_path / "run" / "adapter"
    assert outcome.state.is_finished


def test_metrics_have_one_object_a_step_and_evaluations_where_due(run, tmp_path):
    """Step 0 is the evaluation before training: ln(258) nats for a model that knows nothing."""
    run()

    found = rows(tmp_path / "run")
    assert list(range(11)) == [row["step"] for row in found]
    assert [0, 4, 8, 10] == [row["step"] for row in found if "eval_loss" in row]
    assert {"step": 0, "eval_loss": pytest.approx(np.log(258))} == found[0]
    assert {"step", "train_loss", "tokens_per_second", "learning_rate"} == set(found[1])
    assert pytest.approx(np.log(258)) == found[1]["train_loss"]


def test_losses_are_per_counted_token(run, data, tmp_path):
    """The step's loss does not depend on how long the examples are, nor how many."""
    run(settings=Settings("fake", learning_rate=1e-9, batch_size=7, max_steps=3))

    for row in rows(tmp_path / "run")[1:]:
        assert pytest.approx(np.log(258)) == row["train_loss"]


def test_the_next_step_is_submitted_before_the_last_is_awaited(run, monkeypatch):
    """Else the server waits for us between any two steps."""
    log = []
    service = FakeService(on_operation=log.append)
    result = loop.result_of

    def noting_result(future, is_stopped):
        log.append("awaited")
        return result(future, is_stopped)

    monkeypatch.setattr(loop, "result_of", noting_result)

    run(
        service=service,
        settings=Settings("fake", max_steps=3, eval_fraction=0.0, batch_size=4, save_every=9),
    )

    step, awaited = ["forward_backward", "optim_step"], ["awaited", "awaited"]
    assert step + step + awaited + step == log[:8]


def test_examples_held_out_are_never_trained_on(run, data, monkeypatch):
    trained, evaluated = set(), set()

    class Watching(FakeService):
        def create_lora_training_client(self, *args, **kwargs):
            training = super().create_lora_training_client(*args, **kwargs)
            for name, seen in (("forward", evaluated), ("forward_backward", trained)):
                method = getattr(training, name)

                def watching(data, loss_fn, method=method, seen=seen):
                    seen |= {tuple(d.model_input.to_ints()) for d in data}
                    return method(data, loss_fn)

                setattr(training, name, watching)
            return training

    run(service=Watching())

    assert (20, 5) == (len(trained), len(evaluated))
    assert not trained & evaluated


def test_three_held_out_prompts_are_shown_before_and_after(run):
    outcome = run()

    assert 3 == len(outcome.shown)
    assert {"\0" * 8} == {shown.before for shown in outcome.shown}
    assert {"aaaaaaaa", "bbbbbbbb"} >= {shown.after for shown in outcome.shown}


def test_of_a_conversation_the_user_s_words_are_shown(run, tmp_path):
    """Not what the chat template writes around them; of several turns, the one that is answered."""
    path = tmp_path / "chats.jsonl"
    begun = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "yes"}]
    rows = [
        [
            *begun,
            {"role": "user", "content": f"number {i}?"},
            {"role": "assistant", "content": "so"},
        ]
        for i in range(20)
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    outcome = run(data=files.read(path))

    prompts = {shown.prompt for shown in outcome.shown}
    assert 3 == len(prompts) and prompts <= {f"number {i}?" for i in range(20)}


def test_nothing_held_out_is_fine(run):
    outcome = run(settings=Settings("fake", eval_fraction=0.0))

    assert (None, []) == (outcome.losses, list(outcome.shown))
    assert outcome.state.is_finished


def test_the_server_is_asked_for_what_the_settings_say(run):
    service = FakeService()

    run(service=service, settings=Settings("fake", rank=4, seed=9, train_mlp=False))

    flags = {"train_mlp": False, "train_attn": True, "train_unembed": None}
    assert [("fake", {"rank": 4, "seed": 9, **flags})] == service.created


def test_what_happened_to_the_data_is_said(run):
    report = Silent()

    run(settings=Settings("fake", max_length=50), report=report)

    assert ["24 examples to train on, 1 held out; 14 cut to --max-length 50 tokens."] == report.said


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_learning_rate_schedules(schedule, expected):
    settings = Settings("fake", learning_rate=1.0, schedule=schedule, warmup_steps=2)

    rates = [settings.learning_rate_at(step, total_steps=6) for step in range(1, 7)]

    assert pytest.approx(expected, abs=1e-6) == rates


# Divergence


class ScaledLogprobs(FakeService):
    """From a step on, the log-probabilities of training are multiplied."""

    def __init__(self, step, factor):
        super().__init__()
        self.step, self.factor = step, factor

    def create_lora_training_client(self, *args, **kwargs):
        training = super().create_lora_training_client(*args, **kwargs)
        forward_backward = training.forward_backward
        steps = itertools.count(1)

        def scaled(data, loss_fn):
            future = forward_backward(data, loss_fn)
            if next(steps) >= self.step:
                for out in future.result().loss_fn_outputs:
                    logprobs = out["logprobs"].to_numpy() * self.factor
                    out["logprobs"] = types.TensorData.from_numpy(logprobs)
            return future

        training.forward_backward = scaled
        return training


LONG = attrs.evolve(SETTINGS, epochs=8, save_every=2)  # 40 steps


def test_a_loss_that_is_not_finite_stops_the_run(run, tmp_path):
    """A checkpoint after it would be of no use."""
    with pytest.raises(loop.DivergedError, match=r"loss nan at step 7.*learning rate is 0\.5"):
        run(service=ScaledLogprobs(7, np.nan), settings=LONG)

    state = run_folder.load_state(tmp_path / "run")
    assert 6 >= state.step


def test_a_loss_that_stays_far_above_the_first_stops_the_run(run):
    """Twenty steps in a row, for single batches may be hard."""
    with pytest.raises(loop.DivergedError, match=r"at step 2[1-9]"):
        run(service=ScaledLogprobs(2, 1e6), settings=LONG)


def test_a_single_hard_batch_does_not(run):
    service = ScaledLogprobs(39, 1e6)

    assert run(service=service, settings=LONG).adapter is not None


# Stopping and resuming


@pytest.fixture
def undisturbed(run, tmp_path):
    run("undisturbed")
    return tmp_path / "undisturbed"


def stopping_at(count):
    """A guard that says stop from its *count*-th question on."""

    @contextmanager
    def guard():
        questions = itertools.count(1)
        yield lambda: next(questions) >= count

    return guard


@pytest.mark.parametrize("questions", range(1, 27))
def test_a_stopped_run_resumes_to_the_same_weights(run, undisturbed, tmp_path, questions):
    """Same data order, same optimizer state: as if nothing had been."""
    service = FakeService()

    stopped = run(service=service, guard=stopping_at(questions))
    finished = run(service=service)

    assert stopped.adapter is None
    assert finished.adapter is not None
    assert adapter(undisturbed) == adapter(tmp_path / "run")
    assert without_speed(rows(undisturbed)) == without_speed(rows(tmp_path / "run"))


@pytest.mark.parametrize("operation", range(1, 39, 3))
def test_a_killed_run_resumes_from_the_last_checkpoint(run, undisturbed, tmp_path, operation):
    """Rows beyond the checkpoint are cut off; they come again."""
    service = FakeService(on_operation=killed_after(operation))

    with pytest.raises(Killed):
        run(service=service)
    service.on_operation = lambda name: None
    run(service=service)

    assert adapter(undisturbed) == adapter(tmp_path / "run")
    assert without_speed(rows(undisturbed)) == without_speed(rows(tmp_path / "run"))


def test_half_a_row_left_by_a_kill_is_cut_off(run, tmp_path, undisturbed):
    service = FakeService(on_operation=killed_after(30))
    with pytest.raises(Killed):
        run(service=service)
    service.on_operation = lambda name: None
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "trai')

    run(service=service)

    assert without_speed(rows(undisturbed)) == without_speed(rows(tmp_path / "run"))


def test_when_the_server_is_too_slow_to_save_the_last_checkpoint_stands(
    run, tmp_path, monkeypatch, undisturbed
):
    """Whoever presses Ctrl-C wants the prompt back."""
    monkeypatch.setattr(loop, "STOP_SECONDS", 0.2)
    service, report = FakeService(), Silent()

    def hangs_when_saved(name):
        service.hangs = "step-000006" in str(service.checkpoints)

    service.on_operation = hangs_when_saved
    stopped = run(service=service, report=report, guard=stopping_at(25))
    service.hangs, service.on_operation = False, lambda name: None
    run(service=service)

    assert 6 == stopped.state.step
    assert "the last checkpoint is of step 6" in report.said[-1]
    assert adapter(undisturbed) == adapter(tmp_path / "run")


@pytest.mark.parametrize(
    ("changed", "flag"),
    [({"rank": 5}, "--rank is 5"), ({"learning_rate": 1.0}, "--learning-rate is 1.0")],
)
def test_a_run_does_not_resume_as_another(run, tmp_path, changed, flag):
    run()

    with pytest.raises(ValueError, match=f"{flag}, but the run to resume has"):
        run(settings=attrs.evolve(SETTINGS, **changed))


@pytest.mark.parametrize("changed", [{"max_steps": 4}, {"epochs": 1}])
def test_a_run_does_not_resume_to_an_earlier_end(run, changed):
    run(settings=attrs.evolve(SETTINGS, max_steps=6, epochs=2))

    with pytest.raises(ValueError, match="omit it, give a larger one, or start a new run"):
        run(settings=attrs.evolve(SETTINGS, **{"max_steps": 6, "epochs": 2, **changed}))


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize("further", [{"max_steps": 9}, {"max_steps": None}, {"epochs": 3}])
def test_a_resumed_run_may_go_further(run, tmp_path, is_finished, further):
    """With a constant learning rate it ends where a longer run from the start does, to the bit."""
    short = attrs.evolve(SETTINGS, epochs=2, max_steps=None if "epochs" in further else 6)
    long = attrs.evolve(short, **further)
    expected = run("longer", settings=long)
    service = FakeService(on_operation=killed_after(1000 if is_finished else 15))
    with nullcontext() if is_finished else pytest.raises(Killed):
        run(service=service, settings=short)
    service.on_operation = lambda name: None
    report = Silent()
    outcome = run(service=service, settings=long, report=report)

    assert outcome.state.is_finished
    assert expected.state.step == outcome.state.step
    assert adapter(tmp_path / "longer") == adapter(tmp_path / "run")
    steps = [row["step"] for row in rows(tmp_path / "run") if "train_loss" in row]
    assert list(range(1, outcome.state.step + 1)) == steps
    assert any("ends as a run to step" in text for text in report.said)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_what_a_longer_run_does_to_a_falling_learning_rate_is_said(run, tmp_path, schedule):
    settings = attrs.evolve(SETTINGS, schedule=schedule, max_steps=4, epochs=2)
    service, report = FakeService(), Silent()
    run(service=service, settings=settings)
    run(service=service, settings=attrs.evolve(settings, max_steps=8), report=report)

    said = next(text for text in report.said if "continues to step 8 instead of 4" in text)
    assert "ends in other weights" in said
    rates = [row["learning_rate"] for row in rows(tmp_path / "run") if "train_loss" in row]
    assert 8 == len(rates)
    assert rates[4] > rates[3]
    assert f"from {rates[3]:.3g} at step 4 to {rates[4]:.3g} at step 5" in said


def test_how_often_to_save_and_evaluate_may_change(run):
    service = FakeService(on_operation=killed_after(30))
    with pytest.raises(Killed):
        run(service=service)
    service.on_operation = lambda name: None

    outcome = run(service=service, settings=attrs.evolve(SETTINGS, save_every=1, eval_every=1))

    assert outcome.state.is_finished


def test_a_run_does_not_resume_with_other_data(run, data, tmp_path):
    run()
    Path(data.name).write_text('{"text": "other"}')

    with pytest.raises(ValueError, match="is not the data that the run to resume was started with"):
        run_folder.check_same(
            run_folder.load_state(tmp_path / "run"), SETTINGS, files.read(data.name)
        )


@pytest.mark.parametrize("content", ["", "{}", '{"settings": {"nonsense": 1}}', "[]"])
def test_a_state_that_cannot_be_read_is_named(tmp_path, content):
    (tmp_path / "state.json").write_text(content)

    with pytest.raises(ValueError, match=r"state.json is not a run's state"):
        run_folder.load_state(tmp_path)


def test_the_model_is_closed_whatever_happens(run):
    """Else a server keeps the memory of every run that failed."""
    opened = []

    class Failing(FakeService):
        def create_lora_training_client(self, *args, **kwargs):
            opened.append(super().create_lora_training_client(*args, **kwargs))
            return opened[-1]

        def create_rest_client(self):
            raise errors.NotOfferedError("no archives here", status=404)

    with pytest.raises(errors.NotOfferedError):
        run(service=Failing())

    assert opened[0].is_closed


def test_the_fake_learns_as_its_gradient_says():
    """The tests above stand on it: against finite differences."""
    training = FakeService().create_lora_training_client("fake")
    training.logits = np.random.default_rng(0).normal(size=258)
    [example] = datums.render(
        [records.Text("hello")], ByteTokenizer(), datums.Options(100)
    ).examples
    datum = example.datum(0.7)

    def loss():
        out = training.forward([datum], "cross_entropy").result()
        return 0.7 * supervised._loss_sum(out, [example])

    training.forward_backward([datum], "cross_entropy")
    for token in (*b"helo", 257, 0):
        training.logits[token] += 1e-2
        above = loss()
        training.logits[token] -= 2e-2
        below = loss()
        training.logits[token] += 1e-2
        assert pytest.approx((above - below) / 2e-2, abs=2e-3) == training.gradient[token]
