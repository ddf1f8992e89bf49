"""The demonstration: fine-tune a real language model on a task with an obvious effect.

Runs `tinkex train` as a user would. Its data is generated: sentences about invented people for
SmolLM2, docstrings of Python's standard library for the built-in model.

Usage: python -m tinkex.cli.demo FOLDER [smollm2|tiny]
"""

from __future__ import annotations

import ast
import json
import shlex
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from tinkex import cli
from tinkex.cli.demo_people import INSTRUCTION, line, people
from tinkex.recipes import charts

#: The held-out loss must fall by this fraction, or the demonstration has failed.
LEAST_FALL = 0.5
#: Folders of the library with tests, programs and third-party packages.
SKIPPED = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "turtledemo"}
#: Longer signatures and paragraphs, in characters, are omitted.
MAX_CHARACTERS = 400

#: Sentences to train on, held out, and shown with their answers.
TRAINED, HELD_OUT, SHOWN = 120, 16, 5
#: Most tokens of an answer.
ANSWER_TOKENS = 64

#: A real model knows enough of JSON to learn this within a few steps. Small batches, since a
#: token's activations take 0.9 MB.
SMOLLM2_OPTIONS = {
    "--base-model": "smollm2",
    "--rank": "16",
    "--learning-rate": "1e-3",
    "--schedule": "linear",
    "--batch-size": "4",
    "--epochs": "1",
    "--max-length": "256",
    "--eval-every": "15",
    "--save-every": "15",
}

#: Small batches, for many steps in little time; the base model is random, so a high rank.
TINY_OPTIONS = {
    "--base-model": "tiny",
    "--rank": "64",
    "--learning-rate": "2e-3",
    "--schedule": "linear",
    "--batch-size": "8",
    "--epochs": "1",
    "--max-length": "256",
    "--eval-fraction": "0.02",
}


def main(folder: Path, model: str = "smollm2") -> int:
    """Run the demonstration with *model* ("smollm2" or "tiny"); returns the exit status."""
    if model not in ("smollm2", "tiny"):
        print(f"There is no demonstration with {model!r}; choose smollm2 or tiny.", file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    if model == "smollm2" and not _pulled():
        print("\nsmollm2 cannot be fetched (see above); training the built-in model instead.\n")
        model = "tiny"
    return train_smollm2(folder) if model == "smollm2" else train_tiny(folder)


def _pulled() -> bool:
    """Fetch SmolLM2 in a separate process, because the conversion leaves 350 MB allocated."""
    command = [sys.executable, "-m", "tinkex", "model", "pull", "smollm2"]
    return subprocess.run(command, check=False).returncode == 0


def train_smollm2(folder: Path) -> int:
    """Teach SmolLM2 to write sentences about people as JSON, and show answers before and after."""
    begun = time.monotonic()
    output = folder / "run"
    data, held_out = folder / "people.jsonl", folder / "held-out.jsonl"
    pairs = list(people(TRAINED + HELD_OUT, seed=0))
    for path, part in ((data, pairs[:TRAINED]), (held_out, pairs[TRAINED:])):
        path.write_text("".join(line(*pair) for pair in part), encoding="utf-8")
    print(f"{TRAINED} sentences about invented people, and each as JSON: {data}")
    status = _train(data, output, {**SMOLLM2_OPTIONS, "--eval-data": str(held_out)})
    if status != 0:
        return status
    charts.write(output / "metrics.jsonl", output / "loss.svg")
    asked = pairs[TRAINED:]
    answers = _answers(output, [sentence for sentence, _ in asked])
    rows = [(sentence, *said) for (sentence, _), said in zip(asked, answers)]
    print(f"\n{comparison(rows[:SHOWN], shutil.get_terminal_size((100, 24)).columns)}")
    right = [
        sum(_is_json(said[i], expected) for (_, expected), said in zip(asked, answers))
        for i in (0, 1)
    ]
    before, after = _losses(output)
    print(
        f"\nHeld-out loss per token: {before:.3f} before, {after:.3f} after. Correct JSON for "
        f"{len(asked)} held-out sentences: {right[0]} before, {right[1]} after.\n"
        f"Loss curve: {output / 'loss.svg'}. All of it took {time.monotonic() - begun:.0f} s.\n\n"
        "Talk to the result, or to the model as it was before:\n"
        f"  {_program()} chat {shlex.quote(str(output))}\n"
        f"  {_program()} chat smollm2"
    )
    return 0 if right[1] > right[0] and after < before else 1


def _program() -> str:
    """The installed command, as typed in this environment."""
    command = Path(sys.executable).with_name("tinkex")
    try:
        command = command.relative_to(Path.cwd())
    except ValueError:
        return "tinkex"
    return str(command)


def _answers(output: Path, sentences: Sequence[str]) -> list[tuple[str, str]]:
    """Greedy answers of the base model and of the trained model."""
    from tinkex import ServiceClient, types
    from tinkex.recipes import run_folder
    from tinkex.text.renderer import render_prompt
    from tinkex.text.responses import parse_response

    state = run_folder.load_state(output)
    if state is None:
        raise RuntimeError(f"{output} holds no run, although training has ended.")
    with ServiceClient() as service:
        samplers = [
            service.create_sampling_client(base_model=state.settings.base_model),
            service.create_sampling_client(model_path=state.sampler_path),
        ]
        tokenizer = samplers[1].get_tokenizer()
        prompts = [
            render_prompt([{"role": "user", "content": INSTRUCTION + sentence}], tokenizer)
            for sentence in sentences
        ]
        futures = [
            [
                sampler.sample(
                    prompt.model_input,
                    num_samples=1,
                    sampling_params=types.SamplingParams(
                        max_tokens=ANSWER_TOKENS, temperature=0.0, stop=prompt.stop
                    ),
                )
                for sampler in samplers
            ]
            for prompt in prompts
        ]
        texts = [
            [
                str(parse_response(future.result().sequences[0].tokens, tokenizer)["content"])
                for future in pair
            ]
            for pair in futures
        ]
    return [(before, after) for before, after in texts]


def _is_json(answer: str, expected: str) -> bool:
    try:
        return bool(json.loads(answer) == json.loads(expected))
    except ValueError:
        return False


def comparison(rows: Sequence[tuple[str, str, str]], width: int) -> str:
    """Prompt, answer before and answer after, side by side within *width* characters."""
    column = max(20, (width - 4) // 3)

    def cell(text: str) -> list[str]:
        wrapped = [textwrap.wrap(part, column) or [""] for part in text.strip().splitlines()]
        return [line for lines in wrapped for line in lines] or ["(nothing)"]

    lines = [_columns(("PROMPT", "BEFORE", "AFTER"), column)]
    for row in rows:
        lines.append(_columns(("-" * column,) * 3, column))
        cells = [cell(text) for text in row]
        lines += [_columns(parts, column) for parts in zip_longest(*cells, fillvalue="")]
    return "\n".join(lines)


def _columns(cells: Sequence[str], column: int) -> str:
    return "  ".join(cell.ljust(column) for cell in cells).rstrip()


def train_tiny(folder: Path) -> int:
    """Teach the built-in model the docstrings of this Python; 0 if its loss falls enough."""
    begun = time.monotonic()
    data, output = folder / "docstrings.jsonl", folder / "run"
    count = write(data, Path(sysconfig.get_path("stdlib")))
    print(f"{count} functions with a docstring found in {sysconfig.get_path('stdlib')}: {data}")
    status = _train(data, output, TINY_OPTIONS)
    if status != 0:
        return status
    charts.write(output / "metrics.jsonl", output / "loss.svg")
    before, after = _losses(output)
    fall = 1 - after / before
    verdict = "" if fall >= LEAST_FALL else f", LESS than the {LEAST_FALL:.0%} that is expected"
    print(
        f"\nHeld-out loss per token fell from {before:.3f} to {after:.3f}, by {fall:.0%}{verdict}, "
        f"in {time.monotonic() - begun:.0f} s."
    )
    return 0 if fall >= LEAST_FALL else 1


def _train(data: Path, output: Path, options: Mapping[str, str]) -> int:
    shutil.rmtree(output, ignore_errors=True)
    words = [word for option in options.items() for word in option]
    command = ["train", str(data), "--output", str(output), *words]
    print(f"$ tinkex {shlex.join(command)}", flush=True)
    return cli.main(command)


def _losses(output: Path) -> tuple[float, float]:
    """Held-out loss before and after."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    before, *_, after = [row["eval_loss"] for row in rows if "eval_loss" in row]
    return before, after


def write(path: Path, library: Path) -> int:
    """Write a {"prompt", "completion"} line for each documented function; return their number."""
    lines = [
        json.dumps({"prompt": signature, "completion": paragraph})
        for signature, paragraph in sorted(set(docstrings(library)))
    ]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return len(lines)


def docstrings(library: Path) -> Iterator[tuple[str, str]]:
    """(signature, first paragraph of the docstring) of each function in the files of *library*."""
    for path in sorted(library.rglob("*.py")):
        if SKIPPED & set(path.relative_to(library).parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of old ways to write strings
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # a template, or one written for another Python
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                pair = _pair(node)
                if pair is not None:
                    yield pair


def _pair(node: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[str, str] | None:
    paragraph = (ast.get_docstring(node) or "").split("\n\n")[0].strip()
    signature = f"def {node.name}({ast.unparse(node.args)}):\n"
    if not paragraph or max(len(paragraph), len(signature)) > MAX_CHARACTERS:
        return None
    return signature, " ".join(paragraph.split())


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:3]))
