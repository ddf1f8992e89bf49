"""A fine-tuned SmolLM2 in the programs that people run models with: PEFT, and llama.cpp."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch

import tinkex
from tests.support import hf_reference as hf
from tests.support import llama_cpp
from tinkex.cli.demo_people import INSTRUCTION, line, people
from tinkex.text import registry

pytestmark = pytest.mark.slow  # downloads 93 MB, and trains for a minute

TRAINED, ASKED = 120, 3

#: Answers messages by the chat template in the file, the likeliest token each time.
LLAMA_CPP = """
import json, sys
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=512, n_threads=2, verbose=False)
for text in json.load(sys.stdin):
    said = model.create_chat_completion(
        [{"role": "user", "content": text}], max_tokens=64, temperature=0.0
    )
    print(json.dumps(said["choices"][0]["message"]["content"]))
"""


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A run that learned to write sentences as JSON; prompts; its answers; the right ones."""
    folder = tmp_path_factory.mktemp("tuned")
    pairs = list(people(TRAINED + ASKED, seed=0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINKEX_HOME", str(folder / "home"))
        run = tinkex.finetune(
            [json.loads(line(*pair)) for pair in pairs[:TRAINED]],
            "smollm2",
            folder / "run",
            rank=16,
            learning_rate=1e-3,
            schedule="linear",
            batch_size=4,
            eval_fraction=0.0,
            progress=False,
        )
        prompts = [INSTRUCTION + sentence for sentence, _ in pairs[TRAINED:]]
        with run:
            said = [
                run.sample([{"role": "user", "content": text}], temperature=0.0, max_tokens=64)
                for text in prompts
            ]
        yield run, prompts, said, [json.loads(answer) for _, answer in pairs[TRAINED:]]


def test_tinkex_answers_in_the_learned_style(tuned):
    _, _, said, right = tuned

    assert right == [json.loads(text) for text in said]


def test_peft_and_transformers_generate_the_same_text(tuned):
    import transformers

    run, prompts, said, _ = tuned
    base = registry.find("smollm2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = hf.load_adapter(base, run.export(run.folder / "peft", "peft"))

    for text, expected in zip(prompts, said):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.no_grad():
            out = model.generate(**ids, max_new_tokens=64, do_sample=False)
        new = out[0, ids["input_ids"].shape[1] :]
        assert expected == tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_llama_cpp_answers_in_the_learned_style(kind, tuned):
    """With the tokenizer, the template and the end of a turn out of our file."""
    python = llama_cpp.python()
    if python is None:
        pytest.skip(llama_cpp.HINT)
    run, prompts, _, right = tuned
    [file] = run.export(run.folder / kind, "gguf", gguf_type=kind).glob("*.gguf")

    done = subprocess.run(
        [python, "-c", LLAMA_CPP, file],
        input=json.dumps(prompts),
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )

    answers = [json.loads(said) for said in done.stdout.splitlines()]
    assert right == [json.loads(answer) for answer in answers]
