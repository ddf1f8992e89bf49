"""A plot of the losses in a notebook, updated during the run."""

from __future__ import annotations

import time
from typing import Any

from tinkex.recipes import charts
from tinkex.recipes.callbacks import Callback, End
from tinkex.recipes.run import Run

#: Seconds between two drawings.
PAUSE = 1.0


class LossPlot(Callback):
    """Shows train_loss and eval_loss below the cell that trains.

    Args:
        display: shows an object and returns a handle with `update`; IPython's by default.
        clock: seconds; replaceable in tests.
    """

    def __init__(self, display: Any = None, clock: Any = time.monotonic) -> None:
        self._display = display or _ipython
        self._clock = clock
        self._handle: Any = None
        self._drawn = -PAUSE

    def on_start(self, run: Run) -> None:
        self._draw(run)

    def on_step(self, run: Run, row: dict[str, float]) -> None:
        if self._clock() - self._drawn >= PAUSE:
            self._draw(run)

    def on_end(self, run: Run, end: End) -> None:
        self._draw(run)

    def _draw(self, run: Run) -> None:
        self._drawn = self._clock()
        plot = charts.plot(run.metrics)
        if self._handle is None:
            self._handle = self._display(plot)
        else:
            self._handle.update(plot)


def _ipython(plot: Any) -> Any:
    from IPython.display import display

    return display(plot, display_id=True)
