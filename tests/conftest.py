"""What holds for all tests: signals, and how many processor cores each test process may use."""

from __future__ import annotations

import os
import signal

import hypothesis

# A shell that starts us in the background (`make test &`) ignores Ctrl-C, and child processes
# inherit that. But tests check what Ctrl-C does.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Each pytest-xdist process, and each server that it starts, gets its share of the cores. More
# threads than cores make torch several times slower. Set before anything imports torch.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

# No test needs the hub. Without this, whatever names a model that is not here would ask for it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Time limits of hypothesis fail on a busy machine for no fault of the test.
hypothesis.settings.register_profile(
    "tinkex", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("tinkex")
