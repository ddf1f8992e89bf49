"""Keeps sampled sequences for a day, for requests that train on them.

The sequences of sample requests with `record_stability_info` are kept here. Datums refer to them in
their provenance spans; `check` compares both. Does not know how losses use them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import attrs
import numpy as np

from tinkex import types
from tinkex.server.database import Database
from tinkex.server.http_errors import Refusal, shown

#: Seconds that a sequence is kept after it was sampled or last trained on.
KEPT_SECONDS = 86_400.0
#: Sequences per query; SQLite limits a query to a few hundred values.
_AT_A_TIME = 500


@attrs.frozen
class RecordedRow:
    """tokens and prompt: int32; logprobs: float32."""

    sequence_id: str
    owner: str
    session_id: str
    prompt: bytes
    tokens: bytes
    logprobs: bytes
    expires_at: float


class Recorded:
    """The recorded sequences of a home. Safe to share between threads."""

    def __init__(self, database: Database, now: Callable[[], float] = time.time) -> None:
        self._db = database
        self._now = now

    def add(
        self,
        owner: str,
        session_id: str,
        sequence_ids: Iterable[str],
        prompt: types.ModelInput,
        response: types.SampleResponse,
    ) -> None:
        """Keep the sequences of a response."""
        prompt_bytes = prompt.tokens.astype("<i4").tobytes()
        expires_at = self._now() + KEPT_SECONDS
        with self._db.transaction() as db:
            db.executemany(
                "INSERT OR REPLACE INTO recorded VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        sequence_id,
                        owner,
                        session_id,
                        prompt_bytes,
                        sequence.tokens_np.astype("<i4").tobytes(),
                        np.asarray(sequence.logprobs or [], "<f4").tobytes(),
                        expires_at,
                    )
                    for sequence_id, sequence in zip(sequence_ids, response.sequences)
                ],
            )

    def check(self, owner: str, session_id: str, data: Sequence[types.Datum]) -> None:
        """Compare the spans of *data* with the recorded sequences, which are then kept longer.

        Spans of sequences that were not recorded are not checked.

        Raises:
            Refusal: 400 if a sequence belongs to another session, or its tokens differ.
        """
        spans = [
            span
            for datum in data
            for span in (*(datum.model_input_spans or ()), *(datum.loss_fn_input_spans or ()))
        ]
        if not spans:
            return
        rows = self._rows({span.sequence_id for span in spans})
        for row in rows.values():
            if (row.owner, row.session_id) != (owner, session_id):
                raise Refusal(
                    400,
                    f"the sequence {shown(row.sequence_id)} was sampled in another session; only "
                    "the session that sampled it can train on it.",
                )
        for index, datum in enumerate(data):
            _check_datum(index, datum, rows)
        with self._db.transaction() as db:
            db.executemany(
                "UPDATE recorded SET expires_at = ? WHERE sequence_id = ?",
                [(self._now() + KEPT_SECONDS, sequence_id) for sequence_id in rows],
            )

    def _rows(self, sequence_ids: set[str]) -> dict[str, RecordedRow]:
        names, found = sorted(sequence_ids), {}
        for start in range(0, len(names), _AT_A_TIME):
            some = names[start : start + _AT_A_TIME]
            marks = ", ".join("?" * len(some))
            for row in self._db.all(
                RecordedRow,
                f"SELECT * FROM recorded WHERE expires_at > ? AND sequence_id IN ({marks})",
                self._now(),
                *some,
            ):
                found[row.sequence_id] = row
        return found

    def delete_expired(self) -> None:
        self._db.change("DELETE FROM recorded WHERE expires_at <= ?", self._now())


def _check_datum(index: int, datum: types.Datum, rows: dict[str, RecordedRow]) -> None:
    """Compare tokens with the recorded ones. Targets in the prompt may be anything: they are not
    trained on, and the official recipes put zeros there."""
    targets = datum.loss_fn_inputs.get("target_tokens")
    fields = [("model_input", datum.model_input_spans, datum.model_input.to_ints)]
    if targets is not None and len(targets.shape) == 1:
        fields.append(("target_tokens", datum.loss_fn_input_spans, targets.tolist))
    for name, spans, tokens_of in fields:
        if spans is None or not any(span.sequence_id in rows for span in spans):
            continue
        place, tokens = 0, np.asarray(tokens_of(), np.int64)
        if sum(span.length for span in spans) != len(tokens):
            raise Refusal(
                400,
                f"the spans of data[{index}].{name} cover another number of tokens than it has "
                f"({len(tokens)}); they must cover each of them once.",
            )
        for span in spans:
            is_free = name == "target_tokens" and isinstance(span, types.PromptProvenanceSpan)
            row = None if is_free else rows.get(span.sequence_id)
            here = tokens[place : place + span.length]
            place += span.length
            if row is not None and not np.array_equal(here, _recorded(row, span)):
                raise Refusal(
                    400,
                    f"data[{index}].{name} holds other tokens than the sequence "
                    f"{shown(span.sequence_id)} has where its span says that they come from "
                    f"(offset {span.offset}, length {span.length}).",
                )


def _recorded(row: RecordedRow, span: types.ProvenanceSpan) -> np.ndarray:
    part = row.prompt if isinstance(span, types.PromptProvenanceSpan) else row.tokens
    return np.frombuffer(part, "<i4")[span.offset : span.offset + span.length]
