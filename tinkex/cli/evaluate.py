"""`tinkex eval`: measure a fine-tuned model on data, beside its base model.

Imports happen when the command runs, so that `tinkex --help` is fast.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tinkex.cli import formatting
from tinkex.cli.model import fetched
from tinkex.cli.options import option, row_options, server_options
from tinkex.cli.sample import what_to_sample

if TYPE_CHECKING:
    from tinkex.recipes import evaluation


@click.command(name="eval")
@click.argument("model", metavar="RUN")
@click.option(
    "--data", multiple=True, required=True, metavar="FILE", help="Examples. May be repeated."
)
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    default=("loss",),
    show_default=True,
    metavar="NAME|FILE.py:FUNCTION",
    help="loss, exact, contains, or a function (answer, row) -> number. May be repeated.",
)
@option("--base/--no-base", None, True, "Measure the base model too.")
@click.option("--limit", type=click.IntRange(1), help="Take only the first examples.")
@option("--max-tokens", click.IntRange(1), 128, "Maximum tokens per answer.")
@option("--max-length", click.IntRange(2), 1024, "Maximum tokens per example, for the loss.")
@option(
    "--temperature",
    click.FloatRange(0),
    0.0,
    "Sampling temperature; 0 always takes the likeliest token.",
)
@click.option("--stop", multiple=True, help="Text that ends an answer. May be repeated.")
@row_options("shape", "renames")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write every example with the answers to this file, as JSON lines.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
@server_options
def evaluate(
    model: str,
    data: tuple[str, ...],
    metrics: tuple[str, ...],
    base: bool,
    limit: int | None,
    max_tokens: int,
    max_length: int,
    temperature: float,
    stop: tuple[str, ...],
    shape: str | None,
    renames: dict[str, str] | None,
    output: Path | None,
    as_json: bool,
    base_url: str | None,
    api_key: str | None,
) -> int:
    """Measure RUN on data, beside the model that it started from.

    RUN is a folder made by `tinkex train`, a tinker:// path, or a base model.
    """
    from tinkex import ServiceClient
    from tinkex.recipes import evaluation

    options = evaluation.Options(max_length, max_tokens, temperature, limit, stop)
    base_model, path = what_to_sample(model)
    with ServiceClient(base_url=base_url, api_key=api_key) as service:
        if path is None:
            name = fetched(str(base_model), base_url, api_key)
            models = {"base": service.create_sampling_client(base_model=name)}
        else:
            tuned = service.create_sampling_client(model_path=path)
            models = {"fine-tuned": tuned}
            if base:
                source = service.create_sampling_client(base_model=tuned.get_base_model())
                models = {"base": source, **models}
        found = evaluation.evaluate(
            models, list(data), metrics, options=options, shape=shape, renames=renames
        )
    if output is not None:
        lines = [json.dumps(answer, ensure_ascii=False) + "\n" for answer in found.answers]
        output.write_text("".join(lines), encoding="utf-8")
    if as_json:
        formatting.say_json(_plain(found))
    else:
        formatting.say(_table(found))
    return 0


def _plain(found: evaluation.Evaluation) -> dict[str, Any]:
    return {
        metric: {
            name: {
                "mean": value.mean,
                "error": None if math.isnan(value.error) else value.error,
                "count": value.count,
            }
            for name, value in models.items()
        }
        for metric, models in found.values.items()
    }


def _table(found: evaluation.Evaluation) -> str:
    """A row per metric, a column per model; with both models, also the change."""
    names = list(next(iter(found.values.values())))
    rows = []
    for metric, models in found.values.items():
        cells = [f"{v.mean:.4f} ± {v.error:.4f}" for v in models.values()]
        if len(models) == 2:
            before, after = (value.mean for value in models.values())
            cells.append(f"{after - before:+.4f}")
        count = next(iter(models.values())).count
        rows.append([metric, str(count), *(cell.replace(" ± nan", "") for cell in cells)])
    return formatting.table(["metric", "examples", *names, *["change"] * (len(names) == 2)], rows)


COMMANDS = (evaluate,)
