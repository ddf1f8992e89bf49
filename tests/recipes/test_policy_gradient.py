"""Advantages, and what a step sends and measures."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from tests.support.fake_policy import FakeService
from tests.support.fake_service import ByteTokenizer
from tinkex.data.records import Task
from tinkex.recipes import rewards, rollouts
from tinkex.recipes.policy_gradient import PolicyGradient, advantages
from tinkex.recipes.settings import RewardSettings

A, B = ord("a"), ord("b")


def count_a(answer, row):
    return {"reward": answer.count("a"), "of_b": answer.count("b")}


@pytest.fixture
def make():
    """An objective of 6 tasks, with a service and its training client."""
    pools = []

    def make(service=None, reward=count_a, reference=None, **settings):
        defaults = {"batch_size": 2, "group_size": 4, "max_tokens": 5, "eval_fraction": 0.0}
        settings = RewardSettings("fake", **{**defaults, **settings})
        pool = rewards.Pool(4, 30)
        pools.append(pool)
        options = rollouts.Options(settings.group_size, settings.max_tokens)
        service = service or FakeService()
        training = service.create_lora_training_client("fake")
        training.logits[[A, B]] = 5.0
        tasks = [Task(f"{i}:", {"prompt": f"{i}:"}) for i in range(6)]
        objective = PolicyGradient(
            tasks,
            tasks[:2],
            settings,
            rollouts.Rollouts(ByteTokenizer(), options, pool, reward),
            0,
            reference,
        )
        return objective, training

    yield make
    for pool in pools:
        pool.close()


class Recorded:
    """A training client that keeps the datums it is given."""

    def __init__(self, training):
        self._training, self.data = training, []

    def __getattr__(self, name):
        return getattr(self._training, name)

    def forward_backward(self, data, loss_fn, config):
        self.data += data
        return self._training.forward_backward(data, loss_fn, config)


# Advantages


def test_advantages_compare_the_answers_of_a_group():
    values = [0.0, 1.0, 1.0, 2.0]

    assert [-1.0, 0.0, 0.0, 1.0] == advantages(values, "centered").tolist()
    np.testing.assert_allclose(
        advantages(values, "grpo"), np.array([-1, 0, 0, 1]) / (np.std(values) + 1e-4)
    )
    others = [np.mean(np.delete(values, i)) for i in range(4)]
    np.testing.assert_allclose(advantages(values, "rloo"), np.subtract(values, others))


@pytest.mark.parametrize("kind", ["grpo", "centered", "rloo"])
@pytest.mark.parametrize("rewards_", [[3.0, 3.0], [7.0]])
def test_equal_rewards_and_single_answers_teach_nothing(kind, rewards_):
    assert not advantages(rewards_, kind).any()


# A step


@pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "cispo", "gspo"])
def test_a_step_sends_advantages_of_what_the_model_said(make, loss):
    """None of the prompt; their mean over the tokens of the step; bounds where they are set."""
    service = FakeService()
    objective, training = make(service, loss=loss, advantage="centered", clip_high=1.3)
    recorded = Recorded(training)

    work = objective.train(recorded, [[0, 3]])
    row = work.read([future.result() for future in work.futures])

    assert [(loss, {"clip_high_threshold": 1.3})] == service.losses
    assert 8 == len(recorded.data)
    groups = [recorded.data[:4], recorded.data[4:]]
    for group in groups:
        given = []
        for datum in group:
            inputs = {key: value.to_numpy() for key, value in datum.loss_fn_inputs.items()}
            assert not inputs["advantages"][:2].any()  # of "0:" after its beginning
            assert (inputs["logprobs"][2:] < 0).all()
            given.append((list(inputs["target_tokens"][2:]).count(A), inputs["advantages"][2:]))
            if loss == "gspo":
                assert [0, 0, 1, 1, 1, 1, 1] == inputs["sequence_ratio_mask"].tolist()
        mean = np.mean([count for count, _ in given])
        for count, found in given:
            np.testing.assert_allclose(found, (count - mean) / 40, atol=1e-7)
    assert row["reward"] == pytest.approx(
        np.mean(
            [list(d.loss_fn_inputs["target_tokens"].to_numpy()).count(A) for d in recorded.data]
        )
    )


@pytest.fixture
def results(monkeypatch):
    """Takes futures for their results."""
    return lambda work: work.read([future.result() for future in work.futures])


def test_a_row_says_what_the_answers_were_like(make, results):
    objective, training = make()

    row = results(objective.train(training, [[0, 1]]))

    assert {
        *("train_loss", "clipped", "reward", "reward_std", "equal_groups", "entropy", "length"),
        *("cut", "reward/of_b", "sampler_kl"),
    } == set(row)
    assert (5.0, 1.0) == (row["length"], row["cut"])
    assert row["entropy"] == pytest.approx(3.63, abs=0.8)  # that of the softmax
    assert row["sampler_kl"] == pytest.approx(0, abs=1e-9)
    assert 0 == row["clipped"]


def test_a_step_makes_better_answers_likelier(make, results):
    objective, training = make()
    before = training.logits[A] - training.logits[B]

    results(objective.train(training, [[0, 1]]))
    training.optim_step(type("Adam", (), {"learning_rate": 1.0}))

    assert training.logits[A] - training.logits[B] > before


def test_a_sampler_that_disagrees_with_the_trainer_is_reported(make, results, caplog):
    """Once: a health check of the server, as rewards need not rise then."""
    objective, training = make()

    class Drifting(Recorded):
        def forward_backward(self, data, loss_fn, config):
            self._training.logits[A] -= 3.0
            return super().forward_backward(data, loss_fn, config)

    drifting = Drifting(training)
    with caplog.at_level(logging.WARNING, "tinkex"):
        rows = [results(objective.train(drifting, [[i]])) for i in range(2)]

    assert min(row["sampler_kl"] for row in rows) > 0.05
    assert 1 == sum("sampler and trainer differ" in text for text in caplog.messages)


def test_the_pull_to_the_reference_lowers_what_has_become_likelier_than_there(make, results):
    """Without differences in reward, the advantage is -kl times the gap, token by token."""
    service = FakeService()
    base = service.create_sampling_client()
    objective, training = make(service, reward=None, reference=base, kl=0.5)
    recorded = Recorded(training)

    row = results(objective.train(recorded, [[0, 1]]))

    for datum in recorded.data:
        inputs = {key: value.to_numpy() for key, value in datum.loss_fn_inputs.items()}
        gap = (inputs["logprobs"] + np.log(258))[2:]
        np.testing.assert_allclose(inputs["advantages"][2:], -0.5 * gap / 40, atol=1e-6)
    assert row["reference_kl"] > 1


# Off policy


def test_one_step_off_policy_samples_for_the_next_step_before_it_trains(make, results):
    """The answers of step n + 1 are from the weights before step n; every task is used once."""
    events = []
    service = FakeService(lambda name: events.append(name))
    objective, training = make(service, off_policy_steps=1)
    chosen = [objective._plan.batch(step) for step in (1, 2, 3)]
    logits = []

    for batch in chosen:
        logits.append(training.logits.copy())
        work = objective.train(training, [batch])
        row = results(work)
        training.optim_step(type("Adam", (), {"learning_rate": 1.0}))

    prompts = [ByteTokenizer().decode(prompt) for prompt, _, _ in service.sampled]
    assert [f"{i}:" for batch in chosen for i in batch] == prompts
    assert row["sampler_kl"] > 0  # the last step's answers are from one step earlier


# Failures


def test_a_reward_that_fails_ends_the_run_as_ctrl_c_does(make):
    from tinkex.recipes import loop

    def score(answer, row):
        return float("nan") if row["prompt"] == "3:" else 1.0

    objective, training = make(reward=score)

    with pytest.raises(loop.Stopped):
        objective.train(training, [[3]])
    message = str(objective.failure)
    assert "score returned nan, which is not a finite number; the answer was" in message
    assert message.endswith("to '3:'")
