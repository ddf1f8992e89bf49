"""Memory of the machine, and of a container that has less."""

from __future__ import annotations

import os

import pytest
import torch

from tinkex.engine import memory

CPU = torch.device("cpu")
MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.fixture
def limits(tmp_path, monkeypatch):
    """Writes the files in which a container's limit and usage are found; None is no file."""

    def write(limit, usage):
        for name, value in (("_LIMITS", limit), ("_USAGES", usage)):
            path = tmp_path / name
            path.unlink(missing_ok=True)
            if value is not None:
                path.write_text(f"{value}\n")
            monkeypatch.setattr(memory, name, (str(tmp_path / "absent"), str(path)))

    return write


@pytest.mark.parametrize("limit", [None, "max", MACHINE * 2])
def test_without_a_smaller_limit_the_memory_is_the_machine_s(limits, limit):
    """Version 2 of cgroups says "max", version 1 a number beyond any machine."""
    limits(limit, 5)

    assert MACHINE == memory.total_memory(CPU)
    assert 0 < memory.available_memory(CPU) <= MACHINE


def test_in_a_container_the_limit_counts_and_what_is_used_of_it(limits):
    """Cached files are in the usage but can be dropped: at most all of the limit is free."""
    limits(2**20, 2**50)
    full = memory.available_memory(CPU)
    limits(2**20, 0)
    empty = memory.available_memory(CPU)

    assert 2**20 == memory.total_memory(CPU)
    assert (0, 2**20) == (full, empty)


def test_a_limit_without_a_known_usage_is_the_bound(limits):
    limits(2**20, None)

    assert 2**20 == memory.available_memory(CPU)


def test_a_system_without_meminfo_offers_what_it_has(limits, monkeypatch):
    """macOS: how much is in use is not known."""
    limits(None, None)
    monkeypatch.setattr(memory.Path, "read_text", lambda *args, **named: "no such fields")

    assert MACHINE == memory.available_memory(CPU)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 MB"), (999_499_999, "999 MB"), (10**9, "1.0 GB"), (16e9, "16.0 GB")]
)
def test_sizes_are_told_in_gigabytes_from_one_on(size, text):
    assert text == memory.gigabytes(size)
