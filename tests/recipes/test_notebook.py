"""The plot in a notebook: drawn once a second, in one place, from what the run has written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from tests.support import environments
from tests.support.processes import ROOT
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


# A real notebook

#: Whatever else these want is resolved by pip; the browser's side is not needed.
JUPYTER = ("nbclient==0.11.0", "ipykernel==7.4.0", "ipywidgets==8.1.9")
CELLS = (
    "import tinkex\nrows = [{'prompt': f'{n} is', 'completion': ' odd.'} for n in range(16)]",
    "run = tinkex.finetune(rows, 'tiny', 'run', rank=4, batch_size=4, epochs=10)",
    "run.plot()",
    "run",
    "tinkex.finetune([], 'tiny', 'empty')",
)


@pytest.mark.slow  # an environment with Jupyter
@pytest.mark.parametrize("widgets", [True, False], ids=["ipywidgets", "without ipywidgets"])
def test_in_jupyter_a_cell_that_trains_has_a_bar_and_a_plot_that_is_updated(tmp_path, widgets):
    python = environments.borrowing(ROOT / "build" / "jupyter", JUPYTER)
    program = [python, Path(__file__).with_name("notebook_program.py"), tmp_path / "ran.ipynb"]
    first = "" if widgets else "import sys; sys.modules['ipywidgets'] = None"
    home = {"TINKEX_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}

    done = subprocess.run(
        [*program, first, *CELLS],
        env={**os.environ, **home},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert 0 == done.returncode, done.stderr
    updates = json.loads(done.stdout)
    _, _, training, plotting, showing, failing = (
        cell["outputs"] for cell in json.loads((tmp_path / "ran.ipynb").read_text())["cells"]
    )
    texts = "".join("".join(each["text"]) for each in training if each["output_type"] == "stream")
    shown = [each["data"] for each in training if each["output_type"] == "display_data"]
    [plot] = [data for data in shown if "text/html" in data]
    bars = [data for data in shown if "application/vnd.jupyter.widget-view+json" in data]

    # One plot, at the end of all steps, after having been drawn as the run went.
    assert "<svg" in "".join(plot["text/html"]) and "Loss per token" in "".join(plot["text/html"])
    assert updates >= 2
    assert "".join(plotting[0]["data"]["text/html"]).count("<circle") == (
        "".join(plot["text/html"]).count("<circle")
    )
    assert bool(bars) is widgets
    assert ("40/40" in texts) is not widgets
    assert "held-out loss" in texts and "Warning" not in texts
    assert "<Run" in "".join(showing[0]["data"]["text/plain"])
    assert ("error", "ValueError") == (failing[0]["output_type"], failing[0]["ename"])
