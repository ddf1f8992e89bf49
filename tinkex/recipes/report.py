"""The report of a run: one HTML file with settings, curves, samples, data, speed and environment.

Self-contained: the file needs no network and no script. `compare` puts several runs side by side.
"""

from __future__ import annotations

import html
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinkex._version import __version__
from tinkex.recipes import charts
from tinkex.recipes.run import Run

#: Name of the report in the folder of a run.
FILE = "report.html"
#: Metrics that share the first chart.
LOSSES = ("train_loss", "eval_loss")
#: Titles of charts; other metrics are shown under their own name.
TITLES = {"learning_rate": "Learning rate", "tokens_per_second": "Tokens per second"}
#: How many of the newest samples taken during training are shown.
MAX_SAMPLES = 30
#: Packages whose versions are shown.
PACKAGES = ("numpy", "torch", "transformers", "tokenizers")

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #1a1a1a; background: #fff; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.summary { color: #555; margin-top: .2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .7rem .3rem 0;
  border-bottom: 1px solid #e4e4e4; overflow-wrap: anywhere; }
th { color: #555; font-weight: 600; }
td.text { white-space: pre-wrap; font-family: ui-monospace, monospace; font-size: 13px; }
svg { max-width: 100%; height: auto; display: block; margin: .5rem 0; }
"""


def write(run: Run, path: Path | None = None) -> Path:
    """
    Write the report of *run*; by default report.html in its folder.

    Raises:
        OSError: If the file cannot be written.
    """
    path = path or run.folder / FILE
    path.write_text(page(run), encoding="utf-8")
    return path


def page(run: Run) -> str:
    """The report of *run* as HTML."""
    state, rows = run.state, run.metrics
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    said = [run.base_model, run.description]
    if losses:
        said.append(f"held-out loss {losses[0]:.4f} before, {losses[-1]:.4f} after")
    sections = [
        f"<h1>{_text(run.folder.resolve().name)}</h1>",
        f'<p class="summary">{_text("; ".join(part for part in said if part))}</p>',
        *_curves(rows),
        _before_and_after(state),
        _samples(run.samples),
        _section("Data", _pairs(_data(state))),
        _section("Speed", _pairs(_speed(rows))),
        _section("Settings", _pairs(_given(run.settings))),
        _section("Environment", _pairs(_environment())),
    ]
    return _document(f"Report of {run.folder.resolve().name}", sections)


def compare(runs: Sequence[Run], path: Path | None = None) -> str:
    """
    Several runs as one HTML page: their curves in one chart, and the settings that differ.

    Args:
        path: also write the page there.

    Raises:
        ValueError: If there are fewer than two runs.
    """
    if len(runs) < 2:
        raise ValueError(f"comparing needs at least two runs, got {len(runs)}.")
    names = _names(runs)
    tables = {name: run.metrics for name, run in zip(names, runs)}
    sections = [f"<h1>{_text(' and '.join(names))}</h1>"]
    for key in _metrics(row for rows in tables.values() for row in rows):
        lines = [charts.line(rows, key, name) for name, rows in tables.items()]
        title = charts.LOSSES.get(key, "")
        title = f"Loss per token, {title}" if title else TITLES.get(key, key)
        sections.append(charts.draw([one for one in lines if one.points], title))
    sections.append(_section("Settings that differ", _differing(names, runs)))
    text = _document(f"Comparison of {', '.join(names)}", sections)
    if path is not None:
        path.write_text(text, encoding="utf-8")
    return text


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Setting -> its value in each run, for the settings that differ."""
    settings = [run.settings for run in runs]
    keys = dict.fromkeys(key for one in settings for key in one)
    found = {key: [one.get(key) for one in settings] for key in keys}
    return {key: values for key, values in found.items() if any(v != values[0] for v in values[1:])}


def _names(runs: Sequence[Run]) -> list[str]:
    """The names of the folders, or their paths if two names are equal."""
    short = [run.folder.resolve().name for run in runs]
    return [name if short.count(name) == 1 else str(run.folder) for name, run in zip(short, runs)]


# Sections


def _metrics(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The metrics in *rows*: losses first, then in order of appearance."""
    keys = dict.fromkeys(
        key
        for row in rows
        for key, value in row.items()
        if key != "step" and isinstance(value, (int, float))
    )
    return [*(key for key in LOSSES if key in keys), *(key for key in keys if key not in LOSSES)]


def _curves(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    found = _metrics(rows)
    pictures = []
    if any(key in LOSSES for key in found):
        pictures.append(charts.draw(charts.losses(rows), "Loss per token"))
    for key in found:
        if key not in LOSSES:
            pictures.append(charts.draw([charts.line(rows, key, key)], TITLES.get(key, key)))
    return [_section("Curves", "".join(pictures))] if pictures else []


def _before_and_after(state: Mapping[str, Any]) -> str:
    told = list(
        zip(state.get("prompts") or [], state.get("before") or [], state.get("after") or [])
    )
    if not told:
        return ""
    return _section("Held-out prompts", _table(("prompt", "before", "after"), told, "text"))


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    newest = [(s["step"], s["prompt"], s["text"]) for s in samples[-MAX_SAMPLES:]]
    if not newest:
        return ""
    return _section("Samples as training went", _table(("step", "prompt", "text"), newest, "text"))


def _data(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "files": state.get("data"),
        "held-out files": state.get("eval_data"),
        "sha256": state.get("data_sha256"),
        **{key.replace("_", " "): count for key, count in (state.get("counts") or {}).items()},
    }


def _speed(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    speeds = sorted(row["tokens_per_second"] for row in rows if "tokens_per_second" in row)
    if not speeds:
        return {}
    return {
        "steps": len(speeds),
        "tokens per second, median": f"{speeds[len(speeds) // 2]:,.0f}",
        "slowest step": f"{speeds[0]:,.0f}",
        "fastest step": f"{speeds[-1]:,.0f}",
    }


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is not None}


def _environment() -> dict[str, Any]:
    """The environment of the program that writes the report."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "tinkex": __version__,
        "Python": platform.python_version(),
        **versions,
        "system": platform.platform(),
        "processor cores": os.cpu_count(),
    }


def _differing(names: Sequence[str], runs: Sequence[Run]) -> str:
    found = differences(runs)
    if not found:
        return "<p>None: all settings are the same.</p>"
    rows = [(key, *(_value(value) for value in values)) for key, values in found.items()]
    return _table(("setting", *names), rows)


# HTML


def _document(title: str, sections: Sequence[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in sections if part)
        + "\n</body></html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<h2>{_text(title)}</h2>\n{content}" if content else ""


def _pairs(values: Mapping[str, Any]) -> str:
    rows = [(key, _value(value)) for key, value in values.items() if value is not None]
    return _table((), rows) if rows else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], kind: str = "") -> str:
    first = "".join(f"<th>{_text(name)}</th>" for name in head)
    mark = f' class="{kind}"' if kind else ""
    body = "".join(
        "<tr>" + "".join(f"<td{mark}>{_text(cell)}</td>" for cell in row) + "</tr>\n"
        for row in rows
    )
    return f"<table>{f'<tr>{first}</tr>' if first else ''}\n{body}</table>"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _text(value: Any) -> str:
    return html.escape(str(value))
