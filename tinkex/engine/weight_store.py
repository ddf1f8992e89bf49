"""Storage of frozen weights: in memory, or in files that are memory-mapped.

Pages of a file are read when a layer needs them, and dropped when memory is short. So a model may
be larger than memory, at the cost of reading it from disk in every step.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import attrs
import torch
from torch import Tensor

#: Smaller tensors, in bytes, stay in memory.
SMALLEST = 2**16


@attrs.frozen
class WeightStore:
    """Room for frozen weights.

    Attributes:
        folder: where the files are; None keeps weights in memory. Files are unlinked, so they
            disappear when the process ends, however it ends.
    """

    folder: Path | None = None

    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Room for a tensor of the type and on the device of *like*.

        Raises:
            OSError: If the disk is full.
        """
        count = int(torch.Size(shape).numel())
        if self.folder is None or count * like.element_size() < SMALLEST:
            return like.new_empty(shape)
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".weights-") as file:
            if hasattr(os, "posix_fallocate"):  # a full disk would kill the process later
                os.posix_fallocate(file.fileno(), 0, count * like.element_size())
            flat = torch.from_file(file.name, shared=True, size=count, dtype=like.dtype)
        return flat.view(*shape)

    def keep(self, tensor: Tensor) -> Tensor:
        """*tensor* itself, or a copy of it in a file."""
        if self.folder is None or tensor.nbytes < SMALLEST:
            return tensor
        return self.empty(tensor.shape, tensor).copy_(tensor)


IN_MEMORY = WeightStore()


def is_in_file(tensor: Tensor) -> bool:
    """True if a tensor's numbers are read from a file when they are needed."""
    return tensor.untyped_storage().filename is not None


def free_disk(folder: Path) -> int:
    """Bytes that are free where *folder* is."""
    return shutil.disk_usage(folder).free
