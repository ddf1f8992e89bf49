"""
Recovery: a script that trains sees nothing of a lost model, and ends with the same weights.
"""

from __future__ import annotations

import concurrent.futures
import json
import logging
import os
import signal

import numpy as np
import psutil
import pytest

import tinkex
from tests.support.fake_service import FakeService
from tinkex import errors, types
from tinkex.recipes.recovery import is_lost

STEPS = 12


def batch(step):
    tokens = np.array([step, step + 1, 97, 98])
    data = {"target_tokens": tokens[1:], "weights": np.ones(3, np.float32) / 3}
    return [types.Datum(types.ModelInput.from_ints(tokens[:-1]), data)]


def lost():
    return errors.NotFoundError("there is no such model", status=404)


class Losing(FakeService):
    """The model of the first client is lost at an operation; so are those of the next ones, `times`
    in all, each after as many operations.

    Lost in one of two ways: the call raises, or the future that it returned fails.
    """

    def __init__(self, at, times=1, how="future"):
        super().__init__()
        self.at, self.times, self.how = at, times, how

    def create_lora_training_client(self, *args, **kwargs):
        return self.losing(super().create_lora_training_client(*args, **kwargs))

    def create_training_client_from_state_with_optimizer(self, path):
        return self.losing(super().create_training_client_from_state_with_optimizer(path))

    def losing(self, training):
        answer, left = training._answer, [self.at]

        def failing(name, operation):
            left[0] -= 1
            if left[0] < 0 or (left[0] == 0 and self.times > 0):
                if left[0] == 0:
                    self.times -= 1
                left[0] = min(left[0], 0)
                if self.how == "call":
                    raise lost()
                future = concurrent.futures.Future()
                future.set_exception(lost())
                return future
            return answer(name, operation)

        if self.times > 0:
            training._answer = failing
        return training


def train(service, training=None, start=0, **options):
    """12 steps in the usual way: all submitted at once, results collected at the end."""
    training = training or service.create_lora_training_client("fake")
    with tinkex.keep_alive(
        training, every=4, step=start, connect=lambda: service, pause=lambda s: None, **options
    ) as alive:
        futures = []
        for step in range(start, STEPS):
            alive.position = step + 1
            futures += [
                alive.forward_backward(batch(step), "cross_entropy"),
                alive.optim_step(types.AdamParams(learning_rate=0.3)),
            ]
        outputs = [future.result(timeout=30) for future in futures]
        path = alive.save_state("end").result(timeout=30).path
    return service.checkpoints[path], outputs


@pytest.fixture(scope="module")
def undisturbed():
    return train(FakeService())


def is_same(found, expected):
    (logits, momentum), outputs = found
    (expected_logits, expected_momentum), expected_outputs = expected
    losses = [o.loss_fn_outputs[0]["logprobs"].to_numpy() for o in outputs[::2]]
    expected_losses = [o.loss_fn_outputs[0]["logprobs"].to_numpy() for o in expected_outputs[::2]]
    assert logits.tobytes() == expected_logits.tobytes()
    assert momentum.tobytes() == expected_momentum.tobytes()
    assert np.array_equal(losses, expected_losses)


@pytest.mark.parametrize("how", ["future", "call"])
@pytest.mark.parametrize("at", range(2, 28))
def test_a_loss_at_any_operation_changes_nothing(undisturbed, at, how):
    """The first operation is the first checkpoint; 28 are all."""
    is_same(train(Losing(at, how=how)), undisturbed)


@pytest.mark.parametrize("at", [3, 6, 11])
def test_several_losses_in_a_row_change_nothing(undisturbed, at):
    is_same(train(Losing(at, times=4)), undisturbed)


def test_only_so_many_restarts(caplog):
    """Every model is lost before its next checkpoint: something else is wrong."""
    pauses = []
    service = Losing(3, times=99)

    with (
        caplog.at_level(logging.ERROR, "tinkex"),
        pytest.raises(errors.NotFoundError),
        tinkex.keep_alive(
            service.create_lora_training_client("fake"),
            restarts=3,
            connect=lambda: service,
            pause=pauses.append,
        ) as alive,
    ):
        for step in range(STEPS):
            alive.forward_backward(batch(step), "cross_entropy").result(timeout=30)

    assert [1.0, 1.0, 1.0] == pauses or [1.0, 2.0, 4.0] == pauses
    assert "The model is lost, and it was restored 3 times" in caplog.text


def test_pauses_grow_while_the_server_stays_away():
    """The connection itself fails, again and again."""
    pauses, service, tries = [], Losing(3), [4]

    def connect():
        tries[0] -= 1
        if tries[0] > 0:
            raise errors.APIConnectionError("connection refused")
        return service

    with tinkex.keep_alive(
        service.create_lora_training_client("fake"), connect=connect, pause=pauses.append
    ) as alive:
        alive.forward_backward(batch(0), "cross_entropy").result(timeout=30)
        alive.optim_step(types.AdamParams(learning_rate=0.3)).result(timeout=30)

    assert [1.0, 2.0, 4.0, 8.0] == pauses


def test_a_failure_that_is_no_loss_is_the_caller_s():
    service = FakeService()
    with tinkex.keep_alive(
        service.create_lora_training_client("fake"), connect=lambda: service
    ) as alive:
        with pytest.raises(KeyError):
            alive.forward_backward([types.Datum(types.ModelInput.from_ints([1]), {})], "cross")
        alive.forward_backward(batch(0), "cross_entropy").result(timeout=30)


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (errors.EngineError("died"), True),
        (errors.APIConnectionError("refused"), True),
        (lost(), True),
        (errors.RequestFailedError("out of memory", category="server"), True),
        (errors.RequestFailedError("bad datum", category="user"), False),
        (errors.NotOfferedError("no such endpoint", status=404), False),
        (errors.BillingError("no credit", status=402), False),
        (ValueError("nan"), False),
    ],
)
def test_what_counts_as_a_loss(failure, expected):
    behind = errors.PriorOperationFailedError("not sent")
    behind.__cause__ = failure

    assert expected == is_lost(failure) == is_lost(behind)


# A script that starts again


def test_a_script_that_died_continues_from_the_folder(undisturbed, tmp_path):
    class Died(BaseException):
        pass

    service = FakeService()
    with pytest.raises(Died):
        training = service.create_lora_training_client("fake")
        with tinkex.keep_alive(training, every=4, run=tmp_path, connect=lambda: service) as alive:
            for step in range(7):
                alive.position = step + 1
                alive.forward_backward(batch(step), "cross_entropy")
                alive.optim_step(types.AdamParams(learning_rate=0.3)).result()
            raise Died

    found = tinkex.recover(service, tmp_path)
    assert (4, 4) == (found.step, found.position)
    state, _ = train(service, found.training, found.step, run=tmp_path)
    assert undisturbed[0][0].tobytes() == state[0].tobytes()


def test_there_is_nothing_to_recover_before_the_first_checkpoint(tmp_path):
    assert tinkex.recover(FakeService(), tmp_path) is None


def test_old_checkpoints_are_deleted(tmp_path):
    service = FakeService()

    train(service, run=tmp_path)

    left = [path for path in service.checkpoints if "alive" in path]
    assert [json.loads((tmp_path / "state.json").read_text())["checkpoint"]] == left


def test_callbacks_see_saves_and_restarts(tmp_path):
    seen = []

    class Seeing(tinkex.Callback):
        def on_save(self, run, checkpoint):
            seen.append(checkpoint.step)

        def on_restart(self, run, reason):
            seen.append(reason)

    train(Losing(13), run=tmp_path, callbacks=[Seeing()])

    assert [0, 4, "there is no such model", 8, 12] == seen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be a whole number of at least 1, got 0"),
        ({"restarts": True}, "restarts must be a whole number of at least 1"),
        ({"callbacks": [tinkex.Callback()]}, "callbacks need a run to report"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        tinkex.keep_alive(FakeService().create_lora_training_client("fake"), **options)


def test_the_folder_of_another_recipe_is_not_overwritten(tmp_path):
    (tmp_path / "state.json").write_text('{"settings": {"rank": 4}}')

    with pytest.raises(ValueError, match="contains a run of another recipe"):
        tinkex.keep_alive(FakeService().create_lora_training_client("fake"), run=tmp_path)


# For real: the server is killed


def test_the_engine_is_killed_and_the_weights_are_the_same(tmp_path, monkeypatch):
    """kill -9 of the embedded engine in the middle: a new one resumes on the same home."""
    monkeypatch.setenv("TINKEX_HOME", str(tmp_path / "home"))
    for name in ("TINKER_BASE_URL", "TINKER_API_KEY"):
        monkeypatch.delenv(name, raising=False)

    def run(kill_at):
        with (
            tinkex.ServiceClient() as service,
            tinkex.keep_alive(
                service.create_lora_training_client("tiny", rank=4, seed=1),
                every=3,
                run=tmp_path / f"run{kill_at}",
                pause=lambda seconds: None,
            ) as alive,
        ):
            for step in range(8):
                if step == kill_at:
                    [engine] = [p for p in psutil.Process().children() if "serve" in p.cmdline()]
                    os.kill(engine.pid, signal.SIGKILL)
                data = [types.Datum(
                    types.ModelInput.from_ints([5, 6, 7 + step]),
                    {"target_tokens": np.array([6, 7 + step, 9]), "weights": np.ones(3)},
                )]  # fmt: skip
                alive.forward_backward(data, "cross_entropy")
                alive.optim_step(types.AdamParams(learning_rate=1e-2)).result(timeout=120)
            output = alive.forward(data, "cross_entropy").result(timeout=120)
        return output.loss_fn_outputs[0]["logprobs"].to_numpy()

    assert run(kill_at=None).tobytes() == run(kill_at=5).tobytes()
