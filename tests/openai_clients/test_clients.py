"""litellm, lm-evaluation-harness and inspect-ai on a fine-tuned model of our server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tinkex.engine.tiny
from tests.support.poem import POEM

TOKENIZER = Path(tinkex.engine.tiny.__file__).parent

LITELLM = """
import litellm, sys

litellm.suppress_debug_info = True
url, model = sys.argv[1:]
server = {"api_base": f"{url}/v1", "api_key": "tml-any"}
chat = {"model": f"openai/{model}", "messages": [{"role": "user", "content": "Hello"}]}
settings = {"max_tokens": 12, "temperature": 0, **server}
whole = litellm.completion(**chat, **settings)
print(whole.usage.completion_tokens <= 12, whole.choices[0].finish_reason in ("stop", "length"))
pieces = list(litellm.completion(**chat, **settings, stream=True))
streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces)
print(streamed == (whole.choices[0].message.content or ""), len(pieces) > 1)
text = litellm.text_completion(
    model=f"text-completion-openai/{model}", prompt="The owl and", stop="boat",
    max_tokens=80, temperature=0, **server)
print(text.choices[0].text)
try:
    litellm.completion(**{**chat, "model": "openai/no-such-model"}, **settings)
except litellm.NotFoundError as exc:
    print("no-such-model" in str(exc))
"""

INSPECT = """
import sys
from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import get_model
from inspect_ai.scorer import includes

url, model = sys.argv[1:]
served = get_model(f"openai-api/tinkex/{model}", base_url=f"{url}/v1", api_key="tml-any")
task = Task(dataset=[Sample(input="Hello", target="x")], scorer=includes())
(log,) = eval(task, model=served, max_tokens=8, display="none")
print(log.status, log.samples[0].output.stop_reason in ("stop", "max_tokens"))
"""

QUESTIONS = [
    {"question": "The owl and the", "choices": [" zebra", " pussycat"], "answer": 1},
    {"question": "went to sea in a beautiful", "choices": [" pea-green", " yellow"], "answer": 0},
]
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "doc_to_choice": "{{choices}}",
    "metric_list": [{"metric": "acc"}],
}
TEXT = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 16, "temperature": 0},
    "metric_list": [{"metric": "exact_match"}],
}


@pytest.fixture
def evaluate(program, tmp_path):
    """Runs lm_eval on the questions; returns the results of the task."""

    def run(task, *options):
        data = tmp_path / "questions.jsonl"
        data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
        source = {"dataset_path": "json", "test_split": "test"}
        source["dataset_kwargs"] = {"data_files": {"test": str(data)}}
        # YAML, of which JSON is a part
        (tmp_path / "poem.yaml").write_text(json.dumps({"task": "poem", **source, **task}))
        program(
            "lm_eval", "--include_path", str(tmp_path), "--tasks", "poem", "--output_path",
            str(tmp_path / "results"), *options,
        )  # fmt: skip
        (found,) = (tmp_path / "results").rglob("results_*.json")
        return json.loads(found.read_text())["results"]["poem"]

    return run


def test_litellm(program, server, tuned, tmp_path):
    """Whole and streamed answers are equal, text is continued, an unknown model is not found."""
    (tmp_path / "script.py").write_text(LITELLM)
    lines = program("python", "script.py", server.url, tuned).splitlines()

    assert ["True True", "True True"] == lines[:2]
    assert POEM.removeprefix("The owl and").partition("boat")[0].strip() == lines[2].strip()
    assert "True" == lines[3]


def test_lm_eval_by_log_probabilities(evaluate, server, tuned):
    """The log-probabilities of given answers, by `echo` and `logprobs` of /v1/completions."""
    arguments = (
        f"model={tuned},base_url={server.url}/v1/completions,num_concurrent=2,"
        f"tokenizer_backend=huggingface,tokenizer={TOKENIZER}"
    )
    results = evaluate(CHOICE, "--model", "local-completions", "--model_args", arguments)

    assert 1.0 == results["acc,none"]


def test_lm_eval_by_answers_of_a_chat(evaluate, server, tuned):
    arguments = f"model={tuned},base_url={server.url}/v1/chat/completions,num_concurrent=2"
    results = evaluate(
        TEXT,
        "--model",
        "local-chat-completions",
        "--model_args",
        arguments,
        "--apply_chat_template",
    )

    assert 0.0 <= results["exact_match,none"] <= 1.0


def test_inspect_ai(program, server, tuned, tmp_path):
    (tmp_path / "script.py").write_text(INSPECT)
    said = program("python", "script.py", server.url, tuned)

    assert "success True" in said
