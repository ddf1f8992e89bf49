"""
The words of tinkex: each term has one meaning, and the prose is plain English.

The glossary in docs/architecture.md has the terms. Here are the words and phrases that were
replaced by them, so that they do not return.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: What must not appear -> what to write instead. Matched as whole words, in any case.
REPLACED = {
    r"lanes?": "queue (of the poller), worker (of the engine)",
    r"mend(s|ed|ing)?": "fix",
    r"goes on|went on": "continues, happens",
    r"nobody": "no one, no client, no thread (name what there is none of)",
    r"what stands in the way": "what limits it",
    r"(leave|leaves|left) (it|them) away|left away": "omit",
    r"says? so|said so": "the error names it",
    r"anew": "again",
    r"as ever": "as before",
    r"in vain": "without success",
    r"without a word": "silently",
    r"of before": "earlier",
    r"(is|are|was|were|be|been|being) told|who is told": "is reported, is called, is refused",
    r"what there is to say": "metadata, description",
    r"in words of our own|in our own words": "(describe what it is)",
    r"whose doing it is": "category",
    r"learnt": "learned",
    r"another --output": "a different --output",
    r"moved by one": "shifted by one",
    r"who asks": "the caller, the owner, the client",
    r"everybody|anybody|somebody": "all users, every caller, a client (name them)",
    r"in a process of (its|their) own": "in a separate process",
    r"folded (in|into)": "merged into",
    r"filled up with zeros": "zero-padded",
    r"are not to": "must not",
}
#: Names of modules, classes and folders before they got the field's names.
FORMER_NAMES = {
    r"tinkex[./]local\b": "engine, server",
    r"\bchoosing\.py\b": "engine/token_sampling.py",
    r"\bproducts\.py\b": "engine/matmul.py",
    r"\bpasses\.py\b": "engine/training_pass.py",
    r"\bscores\.py\b": "engine/prompt_logprobs.py",
    r"\bwaiting\.py\b": "runtime/wait_log.py",
    r"\bpacing\.py\b": "runtime/rate_limit.py",
    r"\bconsole\.py\b": "cli/progress.py",
    r"\bwords\.py\b": "cli/formatting.py",
    r"\bdataset\.py\b": "data/",
}

FOLDERS = {"tinkex": "*.py", "tests": "*.py", "docs": "*.md"}
FILES = [
    *sorted(ROOT.glob("*.md")),
    ROOT / "Makefile",
    ROOT / "setup.cfg",
    *(path for folder, names in FOLDERS.items() for path in sorted((ROOT / folder).rglob(names))),
]
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text() for path in FILES if path != Path(__file__)
}


def found(pattern):
    """file:line of each match. Line ends count as spaces, so that phrases match across lines."""
    return [
        f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]!r}"
        for name, text in TEXTS.items()
        for match in re.finditer(pattern.replace(" ", r"\s+(?:#:?\s+)?"), text, re.IGNORECASE)
    ]


@pytest.mark.parametrize("word", REPLACED)
def test_a_word_that_was_replaced_does_not_return(word):
    assert [] == found(rf"\b(?:{word})\b"), f"write instead: {REPLACED[word]}"


@pytest.mark.parametrize("name", FORMER_NAMES)
def test_a_former_name_does_not_return(name):
    assert [] == found(name), f"it is now {FORMER_NAMES[name]}"


def test_each_term_of_the_glossary_has_one_row():
    page = (ROOT / "docs" / "architecture.md").read_text()
    terms = re.findall(r"^\| ([\w -]+) \|", page.partition("## Glossary")[2], re.MULTILINE)

    assert len(terms) > 30
    assert len(set(terms)) == len(terms)
