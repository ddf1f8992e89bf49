"""Relative times, sizes, tables; and durations in options."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import click
import pytest

from tinkex.cli import formatting, options

NOW = datetime(2026, 3, 10, 12, 0, 0, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    "count, text",
    [
        (None, "?"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KB"),
        (1536, "1.5 KB"),
        (1024**2 - 1, "1.0 MB"),
        (5 * 1024**3, "5.0 GB"),
        (3000 * 1024**4, "3000.0 TB"),
    ],
)
def test_sizes_have_a_fitting_unit(count, text):
    assert text == formatting.size(count)


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "just now"),
        (-59, "just now"),
        (59, "in less than a minute"),
        (-60, "1 minute ago"),
        (-3599, "59 minutes ago"),
        (3600, "in 1 hour"),
        (-2 * 86400, "2 days ago"),
        (45 * 86400, "in 45 days"),
        (-60 * 86400, "2026-01-09"),
        (400 * 86400, "2027-04-14"),
    ],
)
def test_times_are_relative_unless_they_are_far_away(seconds, text):
    moment = (NOW + timedelta(seconds=seconds)).isoformat()

    assert text == formatting.when(moment, now=NOW)


def test_times_may_have_the_forms_of_many_servers():
    """With Z, with an offset, without a zone (then it is UTC), or as something else."""
    forms = ["2026-03-10T10:00:00Z", "2026-03-10T12:00:00+02:00", "2026-03-10T10:00:00.123456"]

    assert ["2 hours ago", "2 hours ago", "1 hour ago"] == [
        formatting.when(f, now=NOW) for f in forms
    ]
    assert "yesterday" == formatting.when("yesterday", now=NOW)
    assert ("?", "never") == (formatting.when(None), formatting.when(None, "never"))


@pytest.mark.parametrize(
    "seconds, text",
    [(1, "1 second"), (90, "90 seconds"), (5400, "90 minutes"), (7200, "2 hours"),
     (30 * 86400, "30 days"), (86401, "86401 seconds")],
)  # fmt: skip
def test_a_duration_is_exact(seconds, text):
    assert text == formatting.duration(seconds)


def test_a_table_is_not_cut():
    """Users copy paths from it."""
    path = "tinker://" + "x" * 200
    lines = click.unstyle(formatting.table(("Path", "Size"), [(path, "1 B"), ("short", "10 B")]))

    assert [f"Path{' ' * 207}Size", f"{path}  1 B", f"short{' ' * 206}10 B"] == lines.split("\n")


@pytest.mark.parametrize(
    "text, seconds",
    [("3600", 3600), ("90s", 90), ("15m", 900), ("12h", 43200), ("30d", 2592000), ("2w", 1209600)],
)
def test_durations_have_a_unit_or_are_seconds(text, seconds):
    assert seconds == options.Duration().convert(text, None, None)


@pytest.mark.parametrize("text", ["", "0", "0d", "-1", "1.5h", "1y", "d", "1h30m", "9" * 12])
def test_an_invalid_duration_is_wrong_usage(text):
    with pytest.raises(click.UsageError, match="is not a duration; give seconds, or a number with"):
        options.Duration().convert(text, None, None)
