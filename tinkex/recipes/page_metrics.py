"""Reports a recipe's metrics and samples to the server, whose web page shows them.

The server records training losses itself; it cannot know the learning rate, the held-out loss, or
the recipe's own metrics.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tinkex import errors, types

logger = logging.getLogger("tinkex")

#: Seconds between two reports.
INTERVAL = 2.0
#: Metrics that the server records itself.
_KNOWN = ("train_loss", "tokens", "tokens_per_second")


class PageMetrics:
    """
    Sends the metrics of one model every few seconds.

    Reporting ends with the first failed report, for example on servers other than tinkex's, which
    do not support it. The run continues.

    Args:
        service: a ServiceClient; run_id: of the training run.
        clock: seconds.
    """

    def __init__(
        self, service: Any, run_id: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rest, self._run_id, self._clock = service.create_rest_client(), run_id, clock
        self._rows: list[dict[str, float]] = []
        self._samples: list[types.RunSample] = []
        self._reported = -INTERVAL
        self._is_on = True

    def add(self, row: Mapping[str, float]) -> None:
        """Queue a row of metrics by name, including "step"."""
        told = {
            name: value
            for name, value in row.items()
            if name not in _KNOWN and isinstance(value, (int, float)) and abs(value) < 1e300
        }
        if self._is_on and len(told) > 1:
            self._rows.append(told)
            if self._clock() - self._reported >= INTERVAL:
                self.flush()

    def add_samples(self, samples: Sequence[types.RunSample]) -> None:
        """Queue samples of the model; they are sent with the next row."""
        if self._is_on:
            self._samples += samples

    def flush(self) -> None:
        """Send everything that is queued."""
        if not (self._rows or self._samples) or not self._is_on:
            return
        rows, self._rows = self._rows[-1000:], []
        samples, self._samples = self._samples[-100:], []
        self._reported = self._clock()
        try:
            self._rest.report_run_metrics(self._run_id, rows, samples)
        except errors.TinkexError as exc:
            logger.debug("metrics are not reported to the server any more: %s", exc)
            self._is_on = False
