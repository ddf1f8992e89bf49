"""Curves as SVG pictures."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from tinkex.recipes import charts


def test_the_loss_curve_is_a_picture_of_the_rows(tmp_path):
    rows = [
        {"step": 0, "eval_loss": 2.0},
        {"step": 1, "train_loss": 1.5},
        {"step": 2, "train_loss": 1.0, "eval_loss": 0.5},
    ]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))

    charts.write(metrics, tmp_path / "loss.svg")

    picture = ElementTree.parse(tmp_path / "loss.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    training, held_out = picture.findall(f"{space}polyline")
    assert 2 == len(training.attrib["points"].split())
    ups = [float(point.split(",")[1]) for point in held_out.attrib["points"].split()]
    assert ups[0] < ups[1]  # a smaller loss is further down
    assert 4 == len(picture.findall(f"{space}circle"))


def test_the_chart_of_a_run_that_diverged_leaves_out_what_is_no_number():
    rows = [{"step": 1, "train_loss": 1.0}, {"step": 2, "train_loss": float("nan")}]

    drawn = charts.draw(charts.losses(rows), "Loss")

    assert "nan" not in drawn


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (1.5, 5.55, [1, 2, 3, 4, 5, 6]),
        (0, 37, [0, 10, 20, 30, 40]),
        (3, 3, [2.6, 2.8, 3, 3.2, 3.4]),
        (0.005, 0.005, [0.0044, 0.0046, 0.0048, 0.005, 0.0052, 0.0054, 0.0056]),
    ],
)
def test_ticks_are_round_numbers_around_the_values(low, high, expected):
    assert pytest.approx(expected) == charts.ticks(low, high, 5)


def test_labels_are_text_not_markup():
    drawn = charts.draw([charts.Line("<script>", [(0, 1.0)])], "a < b")

    assert "<script>" not in drawn
    ElementTree.fromstring(drawn)
