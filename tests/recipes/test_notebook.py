"""The plot in a notebook: drawn once a second, in one place, from what the run has written."""

from __future__ import annotations

import json
import sys
import types

from tinkex.cli import progress
from tinkex.recipes.callbacks import End
from tinkex.recipes.notebook import LossPlot
from tinkex.recipes.run import Run


class Screen:
    """IPython's display: keeps what it shows."""

    def __init__(self):
        self.shown, self.updates = [], []

    def __call__(self, plot):
        self.shown.append(plot)
        return self

    def update(self, plot):
        self.updates.append(plot)


def test_the_plot_is_shown_once_and_then_updated_each_second(tmp_path):
    now, screen, run = [0.0], Screen(), Run(tmp_path)
    plot = LossPlot(screen, clock=lambda: now[0])

    plot.on_start(run)
    for step in range(1, 31):
        now[0] += 0.1
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "train_loss": 1 / step}) + "\n")
        plot.on_step(run, {"step": step})
    plot.on_end(run, End("finished"))

    assert 1 == len(screen.shown)
    assert 3 <= len(screen.updates) <= 4
    assert 30 == screen.updates[-1]._repr_html_().count("<circle")


def test_a_notebook_is_recognized_and_a_terminal_is_none(monkeypatch):
    class ZMQInteractiveShell: ...

    class TerminalInteractiveShell: ...

    for shell, expected in ((ZMQInteractiveShell(), True), (TerminalInteractiveShell(), False)):
        module = types.SimpleNamespace(get_ipython=lambda shell=shell: shell)
        monkeypatch.setitem(sys.modules, "IPython", module)
        assert progress.is_notebook() is expected
    monkeypatch.delitem(sys.modules, "IPython")
    assert progress.is_notebook() is False
