"""What all tests of the engine share."""

from __future__ import annotations

from collections.abc import Generator

import pytest
import torch


@pytest.fixture(autouse=True)
def no_more_threads_for_the_next_test() -> Generator[None, None, None]:
    """An engine of several threads gives them to the thread that makes it, and there they stay:
    later tests would compete for the cores with themselves."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
