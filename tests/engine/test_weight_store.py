"""Weights in files without names: their numbers, their memory, and a disk that is full."""

from __future__ import annotations

import errno
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from tinkex.engine.weight_store import IN_MEMORY, WeightStore
from tinkex.server import app

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


def anonymous():
    """Bytes of memory that no file stands behind."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_on_disk_has_its_numbers_and_takes_no_memory(tmp_path, dtype):
    """No file is left to remove, either."""
    store = WeightStore(tmp_path)
    like = torch.empty(0, dtype=dtype)
    before = anonymous()

    kept = store.empty((2**12, 2**12), like)
    for i, row in enumerate(kept):
        row.fill_(i % 100)

    assert anonymous() - before < kept.nbytes / 4
    assert torch.equal(kept[:, 5], (torch.arange(2**12) % 100).to(dtype))
    assert [] == list(tmp_path.iterdir())


def test_what_is_kept_is_a_copy_only_on_disk(tmp_path):
    weights = torch.arange(2**15).view(2**7, 2**8).float()

    copied = WeightStore(tmp_path).keep(weights)

    assert torch.equal(weights, copied)
    assert weights.data_ptr() != copied.data_ptr()
    assert weights is IN_MEMORY.keep(weights)


def test_small_tensors_stay_in_memory(tmp_path):
    """A page each would be wasted on norms and biases."""
    norm = torch.ones(100)

    assert norm is WeightStore(tmp_path).keep(norm)


def test_a_full_disk_fails_before_anything_is_written(tmp_path, monkeypatch):
    """Not later, by a signal that ends the process."""

    def full(descriptor, start, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)

    with pytest.raises(OSError, match="No space left"):
        WeightStore(tmp_path).empty((2**10, 2**10), torch.empty(0))
    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize("is_on", [True, False])
def test_the_server_keeps_weights_in_its_home_only_where_asked_for(is_on, tmp_path, monkeypatch):
    """`tinkex serve --weights-on-disk`."""
    monkeypatch.setenv("TINKEX_HOME", str(tmp_path))

    engine = app.make_engine(device="cpu", weights_on_disk=is_on)

    assert engine._weights_folder == (tmp_path if is_on else None)
