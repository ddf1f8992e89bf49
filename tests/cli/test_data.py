"""`tinkex data`: what is in training data, and which tokens of it are learned."""

from __future__ import annotations

import json

import pytest

from tinkex.cli.data import histogram

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
ROWS = [CHAT, CHAT, {"prompt": "2+2=", "completion": "4"}, {"text": "a" * 50}, {"text": ""}]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    return str(path)


def test_check_counts_what_is_there(run, file):
    status, out, err = run("data", "check", file, "--base-model", "tiny", "--max-length", "40")

    assert 1 == status
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "rows 5 (2 chat, 1 completion, 1 text)" in lines
    assert "examples 4" in lines
    assert "duplicates 1" in lines
    assert "cut off 1 at 40 tokens" in lines
    assert "line 5: text is empty" in err


def test_check_is_content_with_bad_lines_that_are_to_be_skipped(run, file):
    assert 0 == run("data", "check", file, "--base-model", "tiny", "--skip-bad-lines")[0]


def test_check_tells_what_is_learned(run, file):
    """Of 100 tokens 60, say: a template that hides the answers shows here."""
    _, out, _ = run("data", "check", file, "--base-model", "tiny", "--train-on", "all")

    [line] = [line for line in out.splitlines() if line.startswith("tokens")]
    assert " are learned (9" in line


def test_show_marks_what_is_learned(run, file):
    status, out, _ = run("data", "show", file, "--base-model", "tiny", "-n", "1")

    assert 0 == status
    assert "--- line 1:" in out
    assert "<|turn|>user\nhi<|end_turn|><|turn|>assistant\n[[ho<|end_turn|>]]\n" in out


def test_of_preference_pairs_both_answers_are_looked_at(run, tmp_path):
    """As --method dpo reads them."""
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "hi", "chosen": "good", "rejected": "no"}, {"chosen": "a", "rejected": "a"}]
    path.write_text("\n".join(map(json.dumps, rows)))

    status, out, err = run("data", "check", str(path), "--base-model", "tiny")
    _, shown, _ = run("data", "show", str(path), "--base-model", "tiny", "-n", "2")

    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert 1 == status
    assert {"rows 2 (1 preference)", "bad lines 1", "examples 2"} <= set(lines)
    assert "line 2: chosen says nothing that the other does not" in err
    assert ["--- line 1, chosen", "--- line 1, rejected"] == [
        line.partition(":")[0] for line in shown.splitlines() if line.startswith("---")
    ]
    assert "assistant\n[[good<|end_turn|>]]" in shown
    assert "assistant\n[[no<|end_turn|>]]" in shown


def test_keys_are_mapped(run, tmp_path):
    (tmp_path / "data").write_text('{"question": "q", "answer": "a"}')

    _, out, _ = run(
        "data", "show", str(tmp_path / "data"), "--base-model", "tiny",
        "--map", "prompt=question,completion=answer",
    )  # fmt: skip

    assert "q[[a<|end|>]]" in out


def test_a_mapping_that_is_none_is_refused(run, file):
    status, _, err = run("data", "show", file, "--base-model", "tiny", "--map", "prompt")

    assert 2 == status
    assert "'prompt' is not a mapping; write it like prompt=question,completion=answer" in err


def test_a_histogram_has_a_row_for_each_range():
    lines = histogram([1, 1, 2, 20])

    assert "      1-2             3 " + "#" * 40 == lines[0]
    assert "     19-20            1 " + "#" * 13 == lines[-1]
    assert 10 == len(lines)


def test_a_histogram_of_one_length_is_one_row():
    assert 1 == len(histogram([7, 7]))
