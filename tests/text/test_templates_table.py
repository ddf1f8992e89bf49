"""
What happens to a conversation with each kind of template: the table of docs/data.md.

Run as a program with --write, it copies the table into the page.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

import tinkex
from tests.text.conftest import load_pair
from tests.text.test_renderer import (
    ASK,
    KINDS,
    SAY,
    SUNNY,
    SYSTEM,
    THOUGHT,
    TOOLS,
    TURNS,
    counted,
    theirs,
    tool_messages,
)

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "data.md"
TABLE = re.compile(r"(?<=<!-- templates -->\n).*?(?=<!-- end of templates -->)", re.DOTALL)
FAULTS = re.compile(r"<!-- faults -->\n(.*?)<!-- end of faults -->", re.DOTALL)

MODELS = {
    "qwen2_5": "Qwen2.5",
    "qwen3": "Qwen3",
    "llama3": "Llama 3",
    "llama3_1": "Llama 3.1",
    "llama3_2": "Llama 3.2",
    "mistral_v01": "Mistral 7B v0.1, v0.2 until 2024",
    "mistral_v02": "Mistral 7B v0.1, v0.2",
    "mistral_v03": "Mistral 7B v0.3",
    "mistral_nemo": "Mistral Nemo",
    "mistral_small_3": "Mistral Small 3",
    "zephyr": "Zephyr, TinyLlama",
    "llama2": "Llama 2",
    "smollm2": "SmolLM2",
    "smollm3": "SmolLM3",
    "gemma3": "Gemma 3",
    "phi4": "Phi-4",
    "deepseek_r1_distill": "DeepSeek-R1-Distill",
    "deepseekv3": "DeepSeek-V3",
    "gptoss": "gpt-oss",
    "glm4": "GLM-4",
    "glm4moe": "GLM-4.5",
    "olmo2": "OLMo 2",
    "granite": "Granite 3.1",
}
HEAD = (
    "| Models | Equal to transformers | A turn ends with | Several turns | System prompt "
    "| Tools and calls | Reasoning |"
)


def is_shown(render):
    """Whether a template shows what *render* gives it; what it does not show is refused."""
    try:
        render()
    except ValueError:
        return "refused"
    return "yes"


def ending(text):
    """The end of a turn, in Markdown."""
    shown = text.strip("\n").replace("|", "\\|").strip()
    newline = "a newline" if "\n" in text else ""
    return " and ".join(part for part in (f"`{shown}`" if shown else "", newline) if part)


def row(kind):
    ours, reference = load_pair(kind, KINDS[kind][0])
    several = sorted(tinkex.render_turns(TURNS, ours), key=lambda r: r.spans[0].message)
    given = [TURNS[:2], TURNS, *[[SYSTEM, *TURNS]] * KINDS[kind][1]]
    equal = all(
        theirs(reference, messages) == tinkex.render(messages, ours).tokens.tolist()
        for messages in given
    )
    first, last = (run for rendered in several for run in counted(rendered, ours))
    ends = [run.rpartition(m["content"])[2] for run, m in ((first, SAY), (last, SUNNY))]
    end = ending(ends[-1]) or f"{ending(ends[0])} of the next message; nothing ends the last"
    calls = tool_messages({"city": "Berlin"}, content="")
    return [
        MODELS[kind],
        "yes" if equal else "NO",
        end,
        "one example" if len(several) == 1 else "an example each",
        is_shown(lambda: tinkex.render([SYSTEM, *TURNS], ours)),
        is_shown(lambda: tinkex.render_turns(calls, ours, tools=TOOLS)),
        is_shown(lambda: tinkex.render([ASK, THOUGHT], ours)),
    ]


def table():
    lines = ["", HEAD, "|---" * HEAD.count(" |") + "|"]
    lines += ["| " + " | ".join(row(kind)) + " |" for kind in KINDS]
    return "\n".join([*lines, "", ""])


def test_every_kind_is_in_the_table():
    assert set(KINDS) == set(MODELS)


def test_the_page_has_the_table_of_templates():
    """To update it: python -m tests.text.test_templates_table --write"""
    assert table() == TABLE.search(PAGE.read_text(encoding="utf-8")).group()


def named_tests():
    text = FAULTS.search(PAGE.read_text(encoding="utf-8"))[1]
    return re.findall(r"`(tests/\S+\.py)`: `(\w+)`", text)


def test_every_row_of_faults_names_a_test():
    rows = FAULTS.search(PAGE.read_text(encoding="utf-8"))[1].strip().splitlines()[2:]

    assert len(rows) == sum(bool(re.search(r"`tests/\S+\.py`: `\w+`", row)) for row in rows)


@pytest.mark.parametrize(("file", "name"), named_tests())
def test_a_fault_has_a_test(file, name):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))

    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


if __name__ == "__main__" and "--write" in sys.argv:
    old = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(TABLE.sub(lambda _: table(), old), encoding="utf-8")
