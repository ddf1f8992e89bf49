"""What holds for all tests: signals, the processes that run them, and their order."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Generator

import hypothesis
import pytest

# A shell that starts us in the background (`make test &`) ignores Ctrl-C, and child processes
# inherit that. But tests check what Ctrl-C does.
signal.signal(signal.SIGINT, signal.default_int_handler)

PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))

# Each pytest-xdist process, and each server that it starts, gets its share of the cores. More
# threads than cores make torch several times slower: those that wait for each other keep the cores
# busy. "passive" lets them sleep, where a test wants several. Set before anything imports torch.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // PROCESSES
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Tests start hundreds of programs. With this variable, which images of containers often set, each
# would compile tinkex again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# No test needs the hub. Without this, whatever names a model that is not here would ask for it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Time limits of hypothesis fail on a busy machine for no fault of the test.
hypothesis.settings.register_profile(
    "tinkex", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("tinkex")

#: Files and folders with tests of many seconds: most start engines as processes of their own.
LONG = tuple(
    f"tests/{name}"
    for name in (
        "chaos/",
        "checkpoints/test_export_smollm2.py",
        "cli/test_command_line.py",
        "cli/test_demo.py",
        "conformance/",
        "engine/test_loading.py",
        "engine/test_sampling_faults.py",
        "official_sdk/",
        "recipes/test_recovery.py",
        "recipes/test_reinforce.py",
        "recipes/test_train_end_to_end.py",
        "scaling/",
        "server/openai/",
        "server/test_memory.py",
        "server/test_restart.py",
        "server/test_server_engine.py",
        "server/test_slow_peers.py",
        "test_diagnostics.py",
        "test_end_to_end.py",
        "test_endings.py",
    )
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process more than cores: a third of the time that tests take, they wait for others."""
    return (os.cpu_count() or 1) + 1


@pytest.hookimpl(trylast=True)  # after -m and -k have taken out what does not run
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each process starts with long tests. Were they last, one would end long after the others."""
    files: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        files[item.nodeid.split("::")[0]].append(item)
    blocks: list[list[pytest.Item]] = [[] for _ in range(PROCESSES)]
    for number, name in enumerate(name for name in files if name.startswith(LONG)):
        blocks[number % PROCESSES] += files[name]
    short = [item for name in files if not name.startswith(LONG) for item in files[name]]
    # pytest-xdist cuts the list into as many parts of the same length.
    left = len(items)
    for number, block in enumerate(blocks):
        length = left // (PROCESSES - number)
        room = max(0, length - len(block))
        block += short[:room]
        del short[:room]
        left -= length
    blocks[-1] += short
    items[:] = [item for block in blocks for item in block]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Modules and tests stay to the end: no garbage collection looks at them, now or later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
