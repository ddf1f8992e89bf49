"""`tinkex data`: look at training data before it is trained on.

Imports happen when a command runs, so that `tinkex --help` is fast.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs
import click

from tinkex.cli import formatting
from tinkex.cli.options import data_options, option, together

if TYPE_CHECKING:  # for annotations alone
    from tinkex.data import datums, files

#: Rows of the histogram, and the width of its longest bar.
HISTOGRAM_ROWS, HISTOGRAM_WIDTH = 10, 40


@click.group()
def data() -> None:
    """Look at training data: what is in it, and which tokens are learned."""


#: The arguments of both commands.
_shared = together(
    click.argument("sources", nargs=-1, required=True, metavar="DATA..."),
    click.option(
        "--base-model",
        required=True,
        help="The model whose tokenizer and chat template are used.",
    ),
    option(
        "--max-length",
        click.IntRange(2),
        1024,
        "Tokens of an example that are read; the rest is cut off.",
    ),
    data_options,
)


@data.command()
@_shared
def check(sources: tuple[str, ...], **options: Any) -> int:
    """Count what is in DATA: examples, bad lines, lengths, duplicates, tokens that are learned.

    Exit status 1 if there are bad lines and --skip-bad-lines is not given.
    """
    from tinkex.data import datums, files

    look = _read(sources, options)
    file, rendered, bad = look.file, look.rendered, look.bad
    kinds = Counter(type(record).__name__.lower() for record in file.records)
    said = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    formatting.say(f"rows          {len(file.records) + len(file.bad)} ({said})")
    formatting.say(f"bad lines     {len(bad)}")
    formatting.say(f"examples      {len(rendered.examples)}")
    if rendered.split:
        formatting.say(f"              {rendered.split} conversations became several")
    formatting.say(f"omitted       {rendered.dropped} of which nothing is learned")
    same = len(file.records) - len({repr(record) for record in file.records})
    formatting.say(f"duplicates    {same}")
    formatting.say(f"cut off       {rendered.truncated} at {options['max_length']} tokens")
    total = sum(len(example.tokens) for example in rendered.examples)
    counted = datums.counted_tokens(rendered.examples)
    share = f" ({counted / total:.0%})" if total else ""
    formatting.say(f"tokens        {total:,}, of which {counted:,.0f} are learned{share}")
    if rendered.examples:
        formatting.say("\nTokens per example")
        for line in histogram([len(example.tokens) for example in rendered.examples]):
            formatting.say(line)
    if bad:
        click.echo(f"\n{files.describe(file.name, bad)}", err=True)
    return 1 if bad and not options["skip_bad_lines"] else 0


@data.command()
@_shared
@click.option(
    "-n", "count", type=click.IntRange(1), default=3, show_default=True, help="Examples to show."
)
def show(sources: tuple[str, ...], count: int, **options: Any) -> int:
    """Print the first examples of DATA as the model reads them.

    Tokens that are learned are green in a terminal, and between [[ and ]] elsewhere.
    """
    from tinkex.data import files

    look = _read(sources, options, count)
    colored = click.get_current_context().color is not False and sys.stdout.isatty()
    for example in look.rendered.examples[:count]:
        formatting.say(
            f"--- {look.where(example)}: {len(example.tokens)} tokens, "
            f"{example.counted.sum():.0f} learned"
        )
        formatting.say(_marked(example, look.tokenizer, colored))
    if look.bad:
        click.echo(files.describe(look.file.name, look.bad), err=True)
    return 0


@attrs.frozen
class _Look:
    """The data as read from the files, and as rendered for training.

    Attributes:
        shown: the rendered records; of a preference pair, both answers.
        is_pairs: True if the data is preference pairs.
    """

    file: files.DataFile
    shown: Sequence[Any]
    rendered: datums.Rendered
    tokenizer: Any
    is_pairs: bool

    @property
    def bad(self) -> list[files.BadLine]:
        return [*self.file.bad, *self.rendered.bad]

    def where(self, example: datums.Example) -> str:
        side = (", rejected" if example.record % 2 else ", chosen") if self.is_pairs else ""
        return f"{self.shown[example.record].where}{side}"


def _read(sources: tuple[str, ...], options: dict[str, Any], count: int | None = None) -> _Look:
    """The data, and its first *count* records as examples."""
    from datetime import date as Date

    from tinkex.data import datums, files, records
    from tinkex.recipes import preference_pairs
    from tinkex.text import tokenizer

    file = files.read(sources, True, shape=options["data_format"], renames=options["data_map"])
    chosen = tokenizer.load(tokenizer.tokenizer_id(options["base_model"]))
    date = options["date"]
    rendering = datums.Options(
        options["max_length"],
        options["train_on"],
        options["split_turns"],
        None if date is None else Date.fromisoformat(date),
    )
    shown = attrs.evolve(file, records=file.records[:count])
    is_pairs = all(isinstance(record, records.Preference) for record in file.records)
    if is_pairs:
        shown = preference_pairs.as_conversations(shown, "dpo")
        rendering = attrs.evolve(rendering, train_on="assistant", split_turns=False)
    rendered = datums.render(shown.records, chosen, rendering)
    return _Look(file, shown.records, rendered, chosen, is_pairs)


def histogram(lengths: Sequence[int]) -> list[str]:
    """Lines of a bar chart: the number of lengths in each of a few equal ranges."""
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high - low + 1) // HISTOGRAM_ROWS))
    counts = Counter((length - low) // width for length in lengths)
    most = max(counts.values())
    lines = []
    for row in range((high - low) // width + 1):
        start = low + row * width
        bar = "#" * round(counts[row] / most * HISTOGRAM_WIDTH)
        lines.append(f"{start:>7}-{start + width - 1:<7} {counts[row]:>7} {bar}".rstrip())
    return lines


def _marked(example: datums.Example, tokenizer: Any, colored: bool) -> str:
    """The example's text with the weighted tokens marked."""
    text = ""
    start = 0
    tokens, counted = example.tokens.tolist(), example.counted.tolist()
    for stop in range(1, len(tokens) + 1):
        if stop == len(tokens) or counted[stop] != counted[start]:
            part = tokenizer.decode(tokens[start:stop])
            if counted[start]:
                part = click.style(part, fg="green") if colored else f"[[{part}]]"
            text += part
            start = stop
    return text


COMMANDS = (data,)
