"""The demonstration: fine-tune the built-in model on the docstrings of this Python's library.

Collects (signature, first paragraph of the docstring) pairs at run time, so that nothing is
downloaded and no text of others is shipped, then runs `tinkex train` on them as a user would.

Usage: python -m tinkex.cli.demo FOLDER
"""

from __future__ import annotations

import ast
import json
import shlex
import shutil
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from tinkex import cli

#: The held-out loss must fall by this part of itself, or the demonstration has failed.
LEAST_FALL = 0.5
#: Folders of the library that hold tests, programs and other people's packages.
SKIPPED = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "turtledemo"}
#: Longer signatures and paragraphs are left out, in characters.
MAX_CHARACTERS = 400

#: Small batches, for many steps in little time; the base model is random, so a high rank.
TRAIN_OPTIONS = {
    "--base-model": "tiny",
    "--rank": "64",
    "--learning-rate": "2e-3",
    "--schedule": "linear",
    "--batch-size": "8",
    "--epochs": "1",
    "--max-length": "256",
    "--eval-fraction": "0.02",
}


def main(folder: Path) -> int:
    """Collect, train, and say whether the model has learnt; an exit status."""
    begun = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    data, output = folder / "docstrings.jsonl", folder / "run"
    count = write(data, Path(sysconfig.get_path("stdlib")))
    print(f"{count} functions with a docstring found in {sysconfig.get_path('stdlib')}: {data}")
    shutil.rmtree(output, ignore_errors=True)
    options = [word for option in TRAIN_OPTIONS.items() for word in option]
    command = ["train", str(data), "--output", str(output), *options]
    print(f"$ tinkex {shlex.join(command)}", flush=True)
    status = cli.main(command)
    if status != 0:
        return status
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    before, *_, after = [row["eval_loss"] for row in rows if "eval_loss" in row]
    fall = 1 - after / before
    verdict = "as it should" if fall >= LEAST_FALL else f"LESS than {LEAST_FALL:.0%}: it should not"
    print(
        f"\nHeld-out loss per token fell from {before:.3f} to {after:.3f}, by {fall:.0%} "
        f"({verdict}), in {time.monotonic() - begun:.0f} s."
    )
    return 0 if fall >= LEAST_FALL else 1


def write(path: Path, library: Path) -> int:
    """One {"prompt", "completion"} line for each documented function; how many there are."""
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
    sys.exit(main(Path(sys.argv[1])))
