"""`tinkex train`: what goes to stdout and what to stderr, starting and resuming a run."""

from __future__ import annotations

import json

import pytest

from tests.support.fake_service import ByteTokenizer
from tinkex import cli, config, errors
from tinkex.text import tokenizer


def resume(tmp_path, *options):
    return cli.main(["train", "--resume", "--output", str(tmp_path / "run"), *options])


class Killed(BaseException):
    """Stands for the death of the process."""


def kill_after(service, operations):
    left = [operations]

    def on_operation(name):
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    service.on_operation = on_operation


def test_train_prints_its_result_on_stdout_and_the_rest_on_stderr(train, tmp_path, capsys):
    assert 0 == train("--learning-rate", "0.3")

    out, err = capsys.readouterr()
    assert 2 == out.count("before  ")
    assert "Held-out loss per token: 5.5530 before" in out
    assert f"Adapter: {tmp_path / 'run' / 'adapter'}" in out
    assert "38 examples to train on, 2 held out." in err
    assert "step 2/2" in err


def test_train_names_missing_arguments(service, data, tmp_path, capsys):
    assert 2 == cli.main(["train", str(data), "--output", str(tmp_path)])
    assert "Missing --base-model" in capsys.readouterr().err
    assert 2 == cli.main(["train", "--base-model", "fake", "--output", str(tmp_path)])
    assert "Missing DATA" in capsys.readouterr().err


def test_bad_data_is_refused_before_the_first_request(train, service, data, capsys):
    data.write_text('{"text": ""}\n{"text": "good"}')

    assert 1 == train()
    assert "line 1: text is empty" in capsys.readouterr().err
    assert [] == service.addresses


def test_bad_lines_can_be_skipped_and_are_counted(train, data, capsys):
    data.write_text(data.read_text() + '\n{"text": ""}')

    assert 0 == train("--skip-bad-lines")
    assert "1 bad lines omitted" in capsys.readouterr().err


def test_a_missing_file_is_an_error(service, tmp_path, capsys):
    command = ["train", "no.jsonl", "--base-model", "fake", "--output", str(tmp_path / "run")]

    assert 1 == cli.main(command)
    assert "No such file or directory: 'no.jsonl'" in capsys.readouterr().err


def test_the_server_is_an_option(train, service):
    train("--base-url", "http://localhost:1", "--api-key", "k")

    assert [("http://localhost:1", "k")] == service.addresses


def test_a_second_run_does_not_overwrite_the_first(train, capsys):
    train()

    assert 2 == train()
    assert "already contains a run (finished). Continue it with --resume" in capsys.readouterr().err


def test_resume_uses_the_settings_of_the_start(train, service, tmp_path, capsys):
    kill_after(service, 6)
    with pytest.raises(Killed):
        train("--epochs", "3", "--batch-size", "8", "--rank", "5", "--save-every", "1")
    service.on_operation = lambda name: None

    assert 0 == resume(tmp_path)
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert (5, 15, 15) == (state["settings"]["rank"], state["step"], state["total_steps"])


def test_resume_refuses_other_settings(train, service, tmp_path, capsys):
    kill_after(service, 6)
    with pytest.raises(Killed):
        train()

    assert 1 == resume(tmp_path, "--rank", "7")
    assert "--rank is 7, but the run to resume has 32" in capsys.readouterr().err


def test_resume_of_nothing_and_of_something_finished(train, tmp_path, capsys):
    assert 2 == resume(tmp_path)
    assert "there is no run to resume in" in capsys.readouterr().err
    train()

    assert 0 == resume(tmp_path)
    assert "is already finished" in capsys.readouterr().err


def test_a_finished_run_goes_further_with_more_steps(train, tmp_path, capsys):
    assert 0 == train("--max-steps", "2", "--batch-size", "4")
    capsys.readouterr()

    assert 0 == resume(tmp_path, "--max-steps", "3")
    captured = capsys.readouterr()
    assert "continues to step 3 instead of 2" in captured.err
    assert "adapter" in captured.out
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert (3, 3) == (state["step"], state["total_steps"])


def test_when_the_server_fails_the_resume_command_is_printed(train, service, tmp_path, capsys):
    def fails(name):
        if "step-000001" in str(service.checkpoints):
            raise errors.APIConnectionError("the server is gone")

    service.on_operation = fails

    assert 1 == train("--save-every", "1", "--batch-size", "4")
    err = capsys.readouterr().err
    assert f"tinkex train --resume --output {tmp_path / 'run'}" in err
    assert err.endswith("error: the server is gone\n")


# Data


def test_a_row_that_the_template_refuses_is_named_before_the_model_is_loaded(
    train, service, data, monkeypatch, capsys
):
    """Loading takes minutes; then the run would end without saying which line it was."""
    refusing = "{% if messages|length > 2 %}{{ raise_exception('too long') }}{% endif %}x"
    monkeypatch.setattr(tokenizer, "load", lambda _: Templated(refusing))
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    lines = [{"messages": turn}, {"messages": turn * 2}, {"messages": turn}]
    data.write_text("\n".join(json.dumps(line) for line in lines))

    assert 1 == train()
    assert "line 2: the chat template does not accept these messages: too long" in (
        capsys.readouterr().err
    )
    assert [] == service.created


class Templated(ByteTokenizer):
    def __init__(self, chat_template):
        self.chat_template = chat_template


def test_a_separate_file_is_held_out(train, tmp_path, capsys):
    (tmp_path / "eval.jsonl").write_text(json.dumps({"text": "abab"}))

    assert 0 == train("--eval-data", str(tmp_path / "eval.jsonl"))
    assert "40 examples to train on, 1 held out." in capsys.readouterr().err


def test_a_separate_file_is_read_again_when_resuming(train, service, tmp_path, capsys):
    (tmp_path / "eval.jsonl").write_text(json.dumps({"text": "abab"}))
    kill_after(service, 6)
    with pytest.raises(Killed):
        train("--eval-data", str(tmp_path / "eval.jsonl"), "--batch-size", "8", "--save-every", "1")
    service.on_operation = lambda name: None

    assert 0 == resume(tmp_path)
    (tmp_path / "eval.jsonl").write_text(json.dumps({"text": "other"}))
    assert 1 == resume(tmp_path)
    assert "is not the data that the run to resume was started with" in capsys.readouterr().err


def test_columns_of_other_names_are_mapped(train, data, capsys):
    data.write_text("\n".join(['{"question": "q", "answer": "a"}'] * 40))

    assert 1 == train()
    assert "try --map prompt=question,completion=answer" in capsys.readouterr().err
    assert 0 == train("--map", "prompt=question,completion=answer")


def test_preference_pairs_are_not_trained_on_as_if_they_were_examples(train, data, capsys):
    data.write_text('{"prompt": "q", "chosen": "good", "rejected": "bad"}')

    assert 1 == train()
    assert "which is for preference training: --method dpo" in capsys.readouterr().err


def test_several_files_are_trained_on(service, data, tmp_path, capsys):
    command = ["train", str(data), str(data), "--base-model", "fake", "--output"]

    assert 0 == cli.main([*command, str(tmp_path / "run")])
    assert "76 examples to train on, 4 held out." in capsys.readouterr().err


# Models


def test_a_relative_model_is_recorded_as_an_absolute_path(train, service, tmp_path, monkeypatch):
    """From another folder the same name would be another model."""
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)

    train("--base-model", "model")

    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert str(tmp_path / "model") == state["settings"]["base_model"]
    assert str(tmp_path / "model") == service.created[0][0]


def test_the_date_is_recorded(train, tmp_path):
    """Some templates write it: a resumed run has the prompt of the start."""
    train("--date", "2024-07-26")

    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert "2024-07-26" == state["settings"]["date"]


def test_a_run_may_start_from_the_weights_of_another(train, service, data, tmp_path, capsys):
    train("--rank", "5")
    saved = json.loads((tmp_path / "run" / "state.json").read_text())["checkpoint"]
    command = ["train", str(data), "--from", str(tmp_path / "run"), "--output"]

    assert 0 == cli.main([*command, str(tmp_path / "second")])

    state = json.loads((tmp_path / "second" / "state.json").read_text())["settings"]
    assert (saved, "fake", 5) == (state["start_from"], state["base_model"], state["rank"])
    assert (saved, {"weights_only": True}) in service.created


def test_a_run_may_start_from_a_path_whose_model_the_server_knows(train, data, tmp_path):
    train()
    saved = json.loads((tmp_path / "run" / "state.json").read_text())["checkpoint"]

    assert 0 == cli.main(
        ["train", str(data), "--from", saved, "--output", str(tmp_path / "second")]
    )

    state = json.loads((tmp_path / "second" / "state.json").read_text())["settings"]
    assert (saved, "fake", 7) == (state["start_from"], state["base_model"], state["rank"])


@pytest.fixture
def adapter(tmp_path):
    """A folder as PEFT writes it: of the attention layers only."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"r": 6, "base_model_name_or_path": "fake"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    header = json.dumps({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode()
    content = len(header).to_bytes(8, "little") + header
    (folder / "adapter_model.safetensors").write_bytes(content)
    return folder


def test_a_run_may_start_from_a_peft_adapter(service, data, adapter, tmp_path):
    """With its rank and its layers, which the weights must fit."""
    command = ["train", str(data), "--from", str(adapter), "--output", str(tmp_path / "run")]

    assert 0 == cli.main(command)

    base_model, options = service.created[0]
    layers = {"train_mlp": False, "train_attn": True, "train_unembed": False}
    assert "fake" == base_model
    assert {"rank": 6, "seed": 0, "adapter": str(adapter), **layers} == options


def test_a_broken_adapter_is_named(service, data, adapter, tmp_path, capsys):
    (adapter / "adapter_model.safetensors").write_bytes(b"version https://git-lfs")
    command = ["train", str(data), "--from", str(adapter), "--output", str(tmp_path / "run")]

    assert 1 == cli.main(command)
    assert "is not a PEFT adapter (adapter_model.safetensors is not a" in capsys.readouterr().err


def test_from_needs_a_run_or_a_path(train, tmp_path, capsys):
    assert 2 == train("--from", str(tmp_path))
    assert (
        "is neither a run with a checkpoint, nor a PEFT adapter folder, nor a tinker:// path"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("rate", ["nan", "inf", "5"])
def test_an_absurd_learning_rate_is_refused_at_the_start(train, service, rate, capsys):
    assert 0 != train("--learning-rate", rate)
    assert "learning_rate must be above 0 and at most 1" in capsys.readouterr().err
    assert [] == service.addresses


def test_a_number_type_is_of_the_embedded_engine_only(run, tmp_path):
    """A server at --base-url has its own."""
    address = ["--base-url", "http://127.0.0.1:1", "--dtype", "bfloat16"]

    status, _, error = run("train", "x.jsonl", "--output", str(tmp_path / "run"), *address)

    assert 2 == status
    assert "start the server at --base-url with `tinkex serve --dtype`" in error


# Configuration files


def test_a_config_file_sets_options_and_flags_win(train, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("rank: 3\nlearning-rate: 1e-2\nreport-to: [tensorboard]\n")

    assert 0 == train("--config", str(config), "--rank", "5")

    settings = json.loads((tmp_path / "run" / "state.json").read_text())["settings"]
    assert (5, 0.01, ["tensorboard"]) == tuple(
        settings[key] for key in ("rank", "learning_rate", "report_to")
    )


def test_a_config_file_can_hold_everything(service, data, tmp_path):
    config = tmp_path / "run.json"
    output = tmp_path / "run"
    values = {"data": str(data), "base_model": "fake", "output": str(output), "format": "text"}
    config.write_text(json.dumps(values))

    assert 0 == cli.main(["train", "--config", str(config)])
    assert (output / "adapter").is_dir()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("leraning_rate: 1", "there is no setting leraning_rate; did you mean learning_rate?"),
        ("rank: no number", "Invalid value for '--rank': 'no number' is not a valid integer"),
        ("schedule: cosin", "'cosin' is not one of 'constant', 'linear', 'cosine'"),
    ],
)
def test_a_config_with_a_typo_is_refused_and_starts_nothing(
    train, service, tmp_path, capsys, text, message
):
    config = tmp_path / "run.yaml"
    config.write_text(text)

    assert 0 != train("--config", str(config))
    assert message in capsys.readouterr().err
    assert [] == service.addresses
    assert not (tmp_path / "run").exists()


def test_the_config_can_be_printed_and_read_again(train, data, tmp_path, capsys):
    assert 0 == train("--rank", "7", "--prompts", str(_prompts(tmp_path)), "--dump-config")
    text = capsys.readouterr().out
    config = tmp_path / "run.yaml"
    config.write_text(text)

    assert "rank: 7\n" in text and 'prompts: ["one", "two"]\n' in text
    assert 0 == cli.main(["train", "--config", str(config), "--output", str(tmp_path / "run")])
    settings = json.loads((tmp_path / "run" / "state.json").read_text())["settings"]
    assert 7 == settings["rank"]


def _prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("one\ntwo\n")
    return path


def test_an_output_is_needed(data, capsys):
    assert 2 == cli.main(["train", str(data), "--base-model", "fake"])
    assert "Missing option '--output'" in capsys.readouterr().err


def test_dtype_reaches_the_embedded_engine(train, monkeypatch):
    monkeypatch.setattr(config, "_for_engine", {})
    monkeypatch.delenv("TINKEX_DTYPE", raising=False)

    assert 0 == train("--dtype", "bfloat16")
    assert "bfloat16" == config.engine_environment("token")["TINKEX_DTYPE"]
