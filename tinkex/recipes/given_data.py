"""The data of a run: files, objects in memory, or datums.

Objects are stored in a file in the run's folder, so that a script or the command line can resume
the run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tinkex import types
from tinkex.data import datums, files
from tinkex.recipes import preference_losses, preference_pairs
from tinkex.recipes.settings import Settings

#: The name of the file with stored objects.
FILE = "data.jsonl"


def read(data: Any, told: str | None, settings: Settings, keep: Path) -> files.DataFile:
    """
    Read and check the data of a run.

    Args:
        data: a path, or several; a list of dicts, a DataFrame, a `datasets.Dataset`, or an iterable
            of datums. None reads *told*.
        told: data sources of the resumed run, one a line; None for a new run.
        keep: where objects are stored.

    Raises:
        ValueError: If data is invalid, or objects differ from those of the resumed run.
        TypeError: If *data* is none of these.
    """
    if data is None:
        sources: tuple[Any, ...] = tuple((told or "").splitlines())
    elif isinstance(data, (str, Path)):
        sources = (data,)
    elif (
        isinstance(data, (list, tuple))
        and data
        and all(isinstance(source, (str, Path)) for source in data)
    ):
        sources = tuple(data)
    else:
        sources = (_kept(data, settings, keep, told is not None),)
    return files.read(
        sources, settings.skip_bad_lines, shape=settings.data_format, renames=settings.data_map
    )


def _kept(data: Any, settings: Settings, path: Path, is_resumed: bool) -> Path:
    rows = _rows(data)
    # Before anything is written, so that errors give the row's number.
    file = files.from_rows(
        rows, settings.skip_bad_lines, shape=settings.data_format, renames=settings.data_map
    )
    _check_method(file, settings)
    text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    if is_resumed:
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            raise ValueError(
                f"the data differs from that of the run to resume ({path}); give the same data, or "
                "start a new run with a different --output."
            )
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)
    return path


def _check_method(file: files.DataFile, settings: Settings) -> None:
    """Raise ValueError for rows that are meant for another method."""
    if settings.method in preference_losses.LOSSES:
        preference_pairs.as_conversations(file, settings.method)
    elif settings.method == "sft" and not settings.skip_bad_lines:
        reasons = [(record.where, datums.unfit(record)) for record in file.records]
        bad = [files.BadLine(where, reason) for where, reason in reasons if reason is not None]
        if bad:
            raise files.refuse(file.name, bad)


def _rows(data: Any) -> list[dict[str, Any]]:
    if (
        not isinstance(data, Mapping)
        and not hasattr(data, "columns")
        and isinstance(data, Iterable)
    ):
        data = list(data)
        if data and all(isinstance(item, types.Datum) for item in data):
            return [_row(datum, number) for number, datum in enumerate(data)]
    return files.plain_rows(data)


def _row(datum: types.Datum, number: int) -> dict[str, Any]:
    """A cross-entropy datum as tokens and weights, for `records.Tokens`."""
    inputs = datum.loss_fn_inputs
    if "target_tokens" not in inputs:
        raise ValueError(f"datum {number} has no target_tokens, which cross_entropy needs.")
    tokens = datum.model_input.to_ints()
    targets = [int(token) for token in inputs["target_tokens"].to_numpy()]
    if len(tokens) != len(targets) or tokens[1:] != targets[:-1]:
        raise ValueError(
            f"the target_tokens of datum {number} are not its tokens shifted by one; train it with "
            "TrainingClient.forward_backward."
        )
    weights = [1.0] * len(targets)
    if "weights" in inputs:
        weights = [float(weight) for weight in inputs["weights"].to_numpy()]
    return {"tokens": [*tokens, targets[-1]], "weights": [0.0, *weights]}


def read_prompts(path: Path) -> list[str]:
    """
    The prompts in a file: one text a line, or JSON Lines with "prompt".

    Raises:
        ValueError: If there are no prompts, or a JSON line has no prompt.
        OSError: If the file cannot be read.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line) if line.lstrip().startswith("{") else {"prompt": line}
        except ValueError as exc:
            raise ValueError(f"{path} line {number} is not JSON: {exc}") from exc
        if not isinstance(value.get("prompt"), str):
            raise ValueError(f'{path} line {number} has no "prompt" that is a string.')
        found.append(value["prompt"])
    if not found:
        raise ValueError(f"{path} has no prompts; write one per line.")
    return found
