"""Preference training: its runs, its cache of reference log-probabilities, and TRL's numbers."""

from __future__ import annotations

import json
from contextlib import nullcontext

import attrs
import numpy as np
import pytest
import torch

from tests.recipes.test_supervised import Silent
from tests.support import hf_reference
from tests.support.fake_service import ByteTokenizer, FakeService
from tinkex import types
from tinkex.data import datums, files
from tinkex.engine.engine import Engine
from tinkex.recipes import preference_losses, preference_pairs, run_folder, supervised
from tinkex.recipes.settings import Settings

SETTINGS = Settings(
    "fake", method="dpo", learning_rate=0.5, batch_size=4, epochs=2, eval_fraction=0.2, save_every=3
)


@pytest.fixture
def data(tmp_path):
    """25 pairs: the chosen answer is of a's, the rejected one of b's."""
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{i}", "chosen": "a" * (i + 1), "rejected": "b" * 9} for i in range(25)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return files.read(path)


@pytest.fixture
def run(data, tmp_path):
    def run(name="run", service=None, settings=SETTINGS, data=data, **options):
        folder = tmp_path / name
        state = run_folder.load_state(folder)
        service = service or FakeService()
        return supervised.run(service, data, settings, folder, Silent(), state, **options)

    return run


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]


@pytest.mark.parametrize("method", preference_losses.LOSSES)
def test_the_chosen_answers_become_likelier_than_the_rejected(run, tmp_path, method):
    outcome = run(settings=attrs.evolve(SETTINGS, method=method))

    found = rows(tmp_path / "run")
    assert outcome.losses[1] < outcome.losses[0]
    assert found[-1]["eval_reward_margin"] > found[0]["eval_reward_margin"]
    assert 1.0 == found[-1]["eval_reward_accuracy"]
    assert (method in preference_losses.WITH_REFERENCE) == ("kl" in found[1])


def test_before_the_first_step_the_model_is_its_own_reference(run, tmp_path):
    """Margin 0, KL 0, loss ln 2; the metrics of each step are complete."""
    run()

    first = rows(tmp_path / "run")[0]
    assert np.log(2) == pytest.approx(first["eval_loss"])
    assert (0.0, 0.0) == (first["eval_reward_margin"], first["eval_kl"])
    assert rows(tmp_path / "run")[-1]["eval_kl"] > 0


def test_the_tools_of_a_pair_are_shown(tmp_path):
    """Or the pair is a bad line: without its tools an answer would be another one."""
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c", "tools": [tool]}))

    pairs = preference_pairs.as_conversations(files.read(path), "dpo")
    rendered = datums.render(pairs.records, ByteTokenizer(), datums.Options(100))

    assert [(tool,), (tool,)] == [record.tools for record in pairs.records]
    assert ["line 1"] == [bad.where for bad in rendered.bad]
    assert "cannot show tools" in rendered.bad[0].reason


def test_the_reference_is_computed_once(run, tmp_path):
    """An earlier start of the run has left it in the folder; training does not change it."""
    count = {"forward": 0}

    def on_operation(name):
        count[name] = count.get(name, 0) + 1
        if count["forward"] == 4 and name == "optim_step":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(service=(service := FakeService(on_operation)))
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").glob("reference-*")}
    service.on_operation = lambda name: None
    run(service=service)

    assert 2 == len(before)
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").glob("reference-*")}


@pytest.mark.parametrize("keeps_reference", [True, False])
def test_a_resumed_run_is_the_run_that_was_never_stopped(run, tmp_path, keeps_reference):
    """Even without the reference's file: it is that of the model before the first step."""
    run("whole")
    service = FakeService()
    stops = iter([False] * 6)
    run("parts", service, guard=lambda: nullcontext(lambda: next(stops, True)))
    assert not run_folder.load_state(tmp_path / "parts").is_finished
    if not keeps_reference:
        for path in (tmp_path / "parts").glob("reference-*"):
            path.unlink()
    run("parts", service)

    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")


def test_rows_without_a_pair_are_refused_by_place_and_method(run, tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text('{"chosen": "a", "rejected": "b"}\n{"prompt": "a", "completion": "b"}\n')

    with pytest.raises(ValueError, match=r"line 2 of .*not a preference pair.*--method dpo"):
        run(data=files.read(path))
    assert run_folder.load_state(tmp_path / "run") is None


def test_pairs_are_refused_by_supervised_training_with_the_method_that_reads_them(run):
    with pytest.raises(ValueError, match="--method dpo"):
        run(settings=attrs.evolve(SETTINGS, method="sft"))


def test_only_the_answers_count_whoever_speaks_in_the_prompt(tmp_path):
    path = tmp_path / "pairs.jsonl"
    talk = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "old"}]
    talk.append({"role": "user", "content": "v"})
    row = {"prompt": talk, "chosen": "good", "rejected": "bad!"}
    path.write_text(json.dumps(row))

    rendered = datums.render(
        preference_pairs.as_conversations(files.read(path), "dpo").records,
        ByteTokenizer(),
        datums.Options(100, split_turns=False),
    )
    [pair] = preference_pairs.paired(rendered.examples)

    said = [
        ByteTokenizer().decode(example.tokens[example.counted > 0]).strip()
        for example in pair.sides
    ]
    assert ["good", "bad!"] == said


# TRL on the same model


#: TRL reads the unembedding's own weight, so it cannot train an adapter there.
LORA = types.LoraConfig(rank=8, train_unembed=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return hf_reference.make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    targets = hf_reference.targets(LORA)
    return hf_reference.make_adapter(
        base, tmp_path_factory.mktemp("adapter"), target_modules=targets
    )


def sequences():
    """Pairs of (prompt length, chosen tokens, rejected tokens), of several lengths."""
    rng = np.random.default_rng(3)
    found = []
    for prompt, chosen, rejected in ((4, 5, 7), (9, 3, 3), (2, 11, 1)):
        start = rng.integers(0, 256, prompt)
        tails = [rng.integers(0, 256, length) for length in (chosen, rejected)]
        found.append((prompt, *(np.concatenate([start, tail]) for tail in tails)))
    return found


def trl_inputs(pairs):
    """A padded batch as TRL collates it: all chosen, then all rejected."""
    tokens = [pair[side] for side in (1, 2) for pair in pairs]
    prompts = [pair[0] for pair in pairs] * 2
    width = max(map(len, tokens))
    ids, attention, completion = (torch.zeros(len(tokens), width, dtype=torch.long) for _ in "123")
    for i, (sequence, prompt) in enumerate(zip(tokens, prompts)):
        ids[i, : len(sequence)] = torch.from_numpy(sequence)
        attention[i, : len(sequence)] = 1
        completion[i, prompt : len(sequence)] = 1
    return {"input_ids": ids, "attention_mask": attention, "completion_mask": completion}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("method", "theirs"), [("dpo", "sigmoid"), ("ipo", "ipo")])
def test_loss_and_gradients_are_those_of_trl(base, adapter, tmp_path, method, theirs):
    """TRL's DPOTrainer on the same LoRA model, whose reference is the base without the adapter."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    pairs = sequences()
    model = hf_reference.load_adapter(base, adapter)
    trainer = DPOTrainer(
        model,
        args=DPOConfig(
            str(tmp_path / "trl"),
            loss_type=theirs,
            beta=0.3,
            report_to=[],
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    trained = trainer.model.eval()
    for name, parameter in trained.named_parameters():
        if ".ref." in name:  # TRL compares with a copy of the adapter; we want the bare base model
            parameter.data.zero_()
    loss = trainer.compute_loss(trained, trl_inputs(pairs))
    trained.zero_grad()
    loss.backward()
    trained.delete_adapter("ref")

    engine = Engine(device="cpu", threads=1)
    engine.load_base(str(base))
    engine.create_model("base", str(base), LORA, seed=0)
    engine.create_model("model", str(base), LORA, seed=0, adapter=adapter)
    ours = _our_gradients(engine, pairs, method)

    assert float(loss) == pytest.approx(ours[0], rel=1e-4)
    wanted = hf_reference.peft_gradients(trained)
    found = hf_reference.gradients(engine, "model", tmp_path / "snapshot")
    assert wanted.keys() == found.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)


def _our_gradients(engine, sequences, method):
    """The objective of a step, its forward and backward passes made by the engine in here."""
    counted = lambda tokens, prompt: (np.arange(len(tokens)) >= prompt).astype(np.float32)  # noqa: E731
    pairs = [
        preference_pairs.Pair(
            *(datums.Example(t.astype(np.int64), counted(t, prompt), prompt) for t in tails)
        )
        for prompt, *tails in sequences
    ]

    def logprobs(model, data):
        output = hf_reference.drive(
            engine.forward_backward(model, data, "cross_entropy", None, forward_only=True)
        )
        return [one["logprobs"].to_numpy() for one in output.loss_fn_outputs]

    data = [e.datum() for pair in pairs for e in pair.sides]
    reference = preference_pairs.Reference(logprobs("base", data))
    found = []

    class Training:
        def forward_backward_custom(self, data, loss_fn, framework):
            loss, _, gradients = loss_fn(data, logprobs("model", data))
            found.append(loss)
            weighted = [
                types.Datum(d.model_input, {**d.loss_fn_inputs, "weights": -gradient})
                for d, gradient in zip(data, gradients)
            ]
            hf_reference.drive(engine.forward_backward("model", weighted, "cross_entropy", None))

    objective = preference_pairs.Preferences(
        pairs, [], method, preference_losses.Options(0.3), (reference, reference), ByteTokenizer()
    )
    objective.train(Training(), [[0, 1], [2]])  # two batches make one step
    return [sum(found)]
