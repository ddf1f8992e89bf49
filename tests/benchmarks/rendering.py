"""Conversations to tokens and weights, against transformers' cached `apply_chat_template`.

Both are measured in processor time, summed over threads, so that a second core gives no advantage.
transformers returns no weights. Vocabularies are those of Qwen and Mistral, as in the tests.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.rounds import Allowance, in_turns
from tests.benchmarks.rows import Row
from tests.text.conftest import load_pair
from tests.text.test_renderer import KINDS
from tests.text.test_templates_table import MODELS
from tinkex.data import datums, files, records

#: Largest ratio to transformers' time.
TARGET = 2.0
#: Conversations of each kind of template, and of a larger set for two kinds.
FEW, MANY = 100, 10_000
#: Conversations in the file that is read and rendered, and the allowed seconds.
IN_A_FILE, ALLOWED = 100_000, 60.0
WORDS = (
    "the capital of France is Paris and what weather in Berlin today was sunny with some clouds "
    "over there because people wrote much about many things that are good"
).split()
#: Words of a question, and of an answer.
QUESTION, ANSWER = 30, 60


def rows(seconds: float) -> list[Row]:
    """All figures: each kind of template, ten thousand conversations, a whole file."""
    allowance = Allowance(seconds / 2, len(KINDS))
    found = [_row(kind, FEW, 4, "ms", allowance.next()) for kind in KINDS]
    found += [_row(kind, MANY, 2, "s", 0) for kind in ("qwen2_5", "mistral_v02")]
    return [*found, _file()]


def chats(count: int, turns: int) -> list[list[dict[str, str]]]:
    """Conversations of *turns* messages, questions and answers."""
    chosen = random.Random(0)

    def said(role: str, words: int) -> dict[str, str]:
        text = " ".join(chosen.choice(WORDS) for _ in range(words))
        return {"role": role, "content": f"{text.capitalize()}."}

    pair = (("user", QUESTION), ("assistant", ANSWER))
    return [[said(*pair[i % 2]) for i in range(turns)] for _ in range(count)]


def _row(kind: str, count: int, turns: int, unit: str, seconds: float) -> Row:
    ours, theirs = load_pair(kind, KINDS[kind][0], is_real=True)
    said = chats(count, turns)
    data = [records.Chat(tuple(messages)) for messages in said]
    scale = 1e3 / count if unit == "ms" else 1.0

    def with_weights() -> None:
        datums.render(data, ours, datums.Options(4096))

    def without() -> None:
        for messages in said:
            theirs.apply_chat_template(messages, tokenize=True, return_dict=False)

    taken = in_turns([_processor(with_weights, scale), _processor(without, scale)], seconds)
    number = "a conversation" if unit == "ms" else f"{count:,} conversations"
    case = f"{number} of {turns} messages, {MODELS[kind]}"
    return Row(case, unit, *taken, target=TARGET)


def _processor(call: Callable[[], Any], scale: float) -> Callable[[], float]:
    """*call* as a measurement of processor time, in seconds times *scale*."""

    def measured() -> float:
        start = time.process_time()
        call()
        return (time.process_time() - start) * scale

    return measured


def _file() -> Row:
    """Measured once, because it takes as long as many other cases."""
    ours, _ = load_pair("qwen2_5", is_real=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chats.jsonl"
        with path.open("w", encoding="utf-8") as lines:
            for messages in chats(IN_A_FILE, 2):
                print(json.dumps({"messages": messages}), file=lines)
        start = time.process_time()
        rendered = datums.render(files.read(path).records, ours, datums.Options(4096))
        taken = time.process_time() - start
    if len(rendered.examples) != IN_A_FILE:
        raise RuntimeError(f"{len(rendered.examples)} of {IN_A_FILE} conversations were rendered")
    case = f"a file of {IN_A_FILE:,} conversations of 2 messages, read and rendered"
    return Row(case, "s", [taken], [ALLOWED], target=1.0)
