"""`tinkex.reinforce` and `tinkex.distill`: whole runs, resumed ones, and ones that fail."""

from __future__ import annotations

import itertools
import json
import threading
from contextlib import nullcontext

import numpy as np
import pytest
from click.testing import CliRunner

import tinkex
from tests.recipes.test_supervised import Silent
from tests.support.fake_policy import FakeSampling, FakeService
from tinkex import cli, errors
from tinkex.cli import rl
from tinkex.engine import tiny
from tinkex.recipes import config_file, given_data, reinforce, run_folder
from tinkex.recipes.settings import RewardSettings
from tinkex.text import tokenizer

ROWS = [{"prompt": f"{i}:", "length": 8} for i in range(20)]
SETTINGS = {"learning_rate": 0.9, "batch_size": 4, "group_size": 4, "max_tokens": 8, "epochs": 3}


def count(answer, row):
    """Fraction of lower case letters: a tenth of what the untrained model says."""
    return sum(map(str.islower, answer)) / row["length"]


@pytest.fixture
def service(monkeypatch):
    def no_tokenizer(identifier):
        raise errors.TokenizerError(f"{identifier} is only known to the fake server")

    monkeypatch.setattr(tokenizer, "load", no_tokenizer)
    return FakeService()


@pytest.fixture
def learn(service, tmp_path):
    def learn(reward=count, name="run", **options):
        options = {"base_model": "fake", "service": service, "progress": False, **options}
        return tinkex.reinforce(ROWS, reward, output=tmp_path / name, **{**SETTINGS, **options})

    return learn


def rows_of(run):
    return [{k: v for k, v in row.items() if "second" not in k} for row in run.metrics]


# Whole runs


@pytest.mark.parametrize("off_policy_steps", [0, 1])
@pytest.mark.parametrize("advantage", ["grpo", "centered", "rloo"])
def test_the_reward_rises(learn, advantage, off_policy_steps):
    run = learn(advantage=advantage, off_policy_steps=off_policy_steps)

    rewards = [row["reward"] for row in run.metrics if "reward" in row]
    assert np.mean(rewards[-3:]) > 2 * np.mean(rewards[:3]) + 0.2
    evaluated = [row["eval_reward"] for row in run.metrics if "eval_reward" in row]
    assert evaluated[-1] > 0.9
    assert run.is_finished and run.adapter.is_dir()
    assert "Mean reward" in run.plot().svg
    assert run.training.losses is None  # a reward is no loss per token


def test_a_run_is_the_same_whenever_it_is_made(learn):
    assert rows_of(learn(name="one")) == rows_of(learn(name="other", service=FakeService()))


@pytest.mark.parametrize("environment", [None, "environment"])
def test_a_resumed_run_is_the_run_that_was_never_stopped(service, tmp_path, environment):
    data = given_data.read(ROWS, None, RewardSettings("fake"), tmp_path / "data.jsonl")
    settings = RewardSettings("fake", **SETTINGS, save_every=4)

    def start(name, service, stops_after=None):
        left = itertools.repeat(False, stops_after) if stops_after else itertools.repeat(False)
        folder = tmp_path / name
        return reinforce.run(
            service,
            data,
            settings,
            folder,
            Silent(),
            run_folder.load_state(folder),
            lambda: nullcontext(lambda: next(left, True)),
            **({"make_env": OneTurn} if environment else {"reward": count}),
        )

    whole = start("whole", FakeService())
    for _ in range(2):
        assert not start("parts", service, stops_after=8).is_finished
    assert 0 < tinkex.load_run(tmp_path / "parts").step < whole.step
    parts = start("parts", service)

    assert rows_of(whole) == rows_of(parts)


class OneTurn:
    def __init__(self, row):
        self.row = row

    def reset(self):
        return [{"role": "user", "content": self.row["prompt"]}]

    def step(self, message):
        return tinkex.EnvStep(reward=count(message["content"], self.row), done=True)


# What fails


@pytest.mark.parametrize(
    ("failure", "problem"),
    [
        (lambda: 1 / 0, "raised ZeroDivisionError: division by zero"),
        (lambda: float("nan"), "returned nan, which is not a finite number"),
        (lambda: threading.Event().wait(600), r"did not return within 1 s"),
    ],
)
def test_a_reward_that_fails_is_named_and_the_run_can_be_resumed(learn, failure, problem):
    """The work before it is saved: the resumed run ends as if nothing had happened."""
    calls = []

    def score(answer, row):
        calls.append(row)
        return failure() if len(calls) == 100 else count(answer, row)

    with pytest.raises(tinkex.RewardError, match=f"score {problem}.*; the answer was .* to '") as e:
        learn(score, reward_timeout=1.0, name="parts")
    stopped = tinkex.load_run(learn.__closure__[1].cell_contents / "parts")
    assert "resume" in str(e.value)
    assert stopped.step >= 4 and stopped.checkpoint is not None

    resumed = learn(count, resume=True, name="parts", reward_timeout=10.0)

    assert rows_of(learn(name="whole", service=FakeService())) == rows_of(resumed)


def test_either_a_reward_or_an_environment_is_needed(learn):
    for given in ({"reward": None}, {"reward": count, "env": OneTurn}):
        with pytest.raises(ValueError, match="give one of reward and env"):
            learn(**given)


def test_rows_without_a_prompt_are_refused_before_anything_is_trained(service, tmp_path):
    with pytest.raises(ValueError, match=r"row 1: has 'text'; it needs \"prompt\""):
        tinkex.reinforce(
            [{"text": "a"}], count, "fake", tmp_path / "run", service=service, progress=False
        )
    assert not service.created


def test_a_supervised_run_is_not_resumed_as_another_kind(service, learn, tmp_path):
    data = [{"prompt": "a", "completion": "b"}] * 4
    tinkex.finetune(data, "fake", tmp_path / "run", service=service, progress=False)

    with pytest.raises(ValueError, match="the run to resume has method sft"):
        learn(resume=True)


def test_a_single_answer_has_nothing_to_be_compared_with(learn):
    with pytest.raises(ValueError, match="group_size must be at least 2"):
        learn(group_size=1)


# Distillation


def test_a_model_learns_what_its_teacher_says(service, tmp_path, monkeypatch):
    """KL(model || teacher) on the model's own answers falls, without any reward."""
    wanted = np.zeros(258)
    wanted[[65, 66, 67]] = 6.0
    service.checkpoints["tinker://teacher/sampler_weights/final"] = wanted, wanted

    run = tinkex.distill(
        ROWS,
        "tinker://teacher/sampler_weights/final",
        "fake",
        tmp_path / "run",
        service=service,
        progress=False,
        **{**SETTINGS, "epochs": 6, "learning_rate": 0.003},
    )

    divergences = [row["eval_reference_kl"] for row in run.metrics if "eval_reference_kl" in row]
    assert divergences[-1] < 0.3 * divergences[0]
    assert {("importance_sampling", None)} == set(service.losses)


def test_runs_that_are_to_be_equal_ask_for_one_answer_at_a_time(service, tmp_path, monkeypatch):
    """What the server computes together then depends on nothing but the run."""
    asked, answered = [], []

    def counted(method):
        def call(*args, **options):
            future = method(*args, **options)
            asked.append(len(answered))
            result = future.result
            future.result = lambda *a: (answered.append(future), result(*a))[1]
            return future

        return call

    for name in ("sample", "compute_logprobs"):
        method = getattr(FakeSampling, name)
        monkeypatch.setattr(FakeSampling, name, counted(method))

    settings = {**SETTINGS, "group_size": 1, "epochs": 1, "deterministic": True}
    tinkex.distill(
        ROWS, "big", "fake", tmp_path / "run", service=service, progress=False, **settings
    )

    assert list(range(len(asked))) == asked  # each after the answer to the one before


def test_a_teacher_with_another_tokenizer_is_refused(service, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "tests.support.fake_policy.FakeSampling.get_tokenizer",
        lambda self: type("Other", (), {"encode": lambda self, text: [1]})(),
    )

    with pytest.raises(ValueError, match="teacher's tokenizer is not that of the model"):
        tinkex.distill(ROWS, "big", "fake", tmp_path / "run", service=service, progress=False)


# The command line


@pytest.fixture
def command(service, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tinkex, "ServiceClient", lambda **options: service)
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "mine.py").write_text(
        "def score(a, row): return sum(map(str.islower, a)) / row['length']\n"
    )

    def command(*words):
        return CliRunner().invoke(cli.cli, words, catch_exceptions=False, standalone_mode=False)

    return command


OPTIONS = [f"--{key.replace('_', '-')}={value}" for key, value in SETTINGS.items()]


def test_the_command_is_the_function(command, learn, tmp_path):
    words = ["rl", "prompts.jsonl", "--reward", "mine.py:score", "--base-model", "fake"]

    done = command(*words, "--output", "out", *OPTIONS)

    assert 0 == done.return_value, done.output
    assert "Held-out reward: " in done.output
    assert rows_of(learn(service=FakeService())) == rows_of(tinkex.load_run(tmp_path / "out"))


@pytest.mark.parametrize(("name", "made"), [("rl", rl.rl), ("distill", rl.distill)])
def test_a_config_file_has_options_of_the_command_alone(command, tmp_path, name, made):
    judge = {"rl": ["--reward", "mine.py:score"], "distill": ["--teacher", "big"]}[name]
    words = [name, "prompts.jsonl", *judge, "--base-model", "fake", *OPTIONS]
    assert 0 == command(*words, "--output", "out").return_value

    written = config_file.read(tmp_path / "out" / "config.yaml")

    assert set(written) <= {option.name for option in made.params}
    assert 0 == command(name, "--config", "out/config.yaml", "--output", "again").return_value
    again = tinkex.load_run(tmp_path / "again")
    assert rows_of(tinkex.load_run(tmp_path / "out")) == rows_of(again)


# A real model


def test_the_reward_of_a_real_model_rises(tmp_path, monkeypatch):
    """The built-in model learns to say digits, on the embedded engine, in six steps."""
    monkeypatch.setenv("TINKEX_HOME", str(tmp_path / "home"))

    run = tinkex.reinforce(
        [{"prompt": f"{i}:"} for i in range(24)],
        lambda answer, row: sum(map(str.isdigit, answer)) / 8,
        "tiny",
        tmp_path / "run",
        rank=8,
        learning_rate=2e-2,
        max_tokens=8,
        epochs=2,
        eval_fraction=0.0,
        kl=0.001,
        progress=False,
    )

    rewards = [row["reward"] for row in run.metrics]
    assert max(rewards[-2:]) > max(rewards[:2]) + 0.2
    assert max(row["sampler_kl"] for row in run.metrics) < 1e-3
    assert run.metrics[-1]["reference_kl"] > run.metrics[0]["reference_kl"]


@pytest.fixture
def larger(tmp_path):
    """A model of the tokenizer of the built-in one, and five times its size."""
    import torch
    import transformers

    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6}
    config = transformers.LlamaConfig(
        **{**tiny.CONFIG, **shape, "head_dim": 64}, initializer_range=1 / 16
    )
    model = transformers.LlamaForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    assert sum(p.numel() for p in model.parameters()) > 5 * sum(
        tensor.numel() for tensor in tiny.weights().values()
    )
    model.save_pretrained(tmp_path / "larger")
    tiny.write_tokenizer(tmp_path / "larger")
    return str(tmp_path / "larger")


@pytest.mark.slow  # trains three models
def test_a_small_model_learns_from_a_larger_one_and_again_to_the_last_bit(
    larger, tmp_path, monkeypatch
):
    """The divergence from the teacher falls. The teacher and the student's first lessons are made
    once; from there on, two runs with one seed are equal, although the server is asked for
    hundreds of answers at whatever time they arrive."""
    monkeypatch.setenv("TINKEX_HOME", str(tmp_path / "home"))
    rows = [{"prompt": f"{n} is ", "completion": "odd." if n % 2 else "even."} for n in range(24)]
    common = {"batch_size": 6, "learning_rate": 5e-3, "rank": 8, "eval_fraction": 0.0}
    with tinkex.ServiceClient() as service:
        teacher, start = (
            tinkex.finetune(
                rows,
                base,
                tmp_path / name,
                service=service,
                progress=False,
                **{**common, "epochs": epochs},
            )
            for base, name, epochs in ((larger, "teacher", 6), ("tiny", "start", 3))
        )
        one, other = (
            tinkex.distill(
                rows,
                teacher.sampler_path,
                "tiny",
                tmp_path / name,
                service=service,
                progress=False,
                start_from=str(start.folder),
                group_size=4,
                max_tokens=6,
                plain=True,
                epochs=5,
                max_steps=steps,
                deterministic=True,
                **common,
            )
            for name, steps in (("one", None), ("other", 5))
        )

    divergences = [row["reference_kl"] for row in one.metrics if "reference_kl" in row]
    assert np.mean(divergences[-3:]) < 0.75 * np.mean(divergences[:3])
    assert 5 == other.step
    assert rows_of(one)[: len(rows_of(other))] == rows_of(other)


@pytest.mark.slow  # downloads 93 MB, and trains for minutes
def test_smollm2_learns_small_sums(tmp_path, monkeypatch):
    """The example of docs/reinforcement.md: 1 for the right number alone, 0.2 for another one."""
    monkeypatch.setenv("TINKEX_HOME", str(tmp_path / "home"))
    numbers = range(1, 7)
    rows = [
        {"prompt": f"Question: What is {a} + {b}?\nAnswer:", "sum": str(a + b)}
        for a in numbers
        for b in numbers
    ]

    def score(answer, row):
        return 1.0 if answer.strip() == row["sum"] else 0.2 * answer.strip().isdigit()

    run = tinkex.reinforce(
        rows,
        score,
        "smollm2",
        tmp_path / "run",
        eval_prompts=rows,
        plain=True,
        stop=["\n"],
        rank=16,
        learning_rate=3e-4,
        batch_size=6,
        max_tokens=4,
        max_steps=20,
        eval_every=20,
        train_unembed=False,
        progress=False,
    )

    rewards = [row["reward"] for row in run.metrics if "reward" in row]
    evaluated = [row["eval_reward"] for row in run.metrics if "eval_reward" in row]
    assert np.mean(rewards[-4:]) > np.mean(rewards[:2]) + 0.3
    assert evaluated[-1] > evaluated[0] + 0.2
