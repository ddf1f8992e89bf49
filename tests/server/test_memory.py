"""Memory runs out in one model's pass: its request says so, and the next ones work."""

from __future__ import annotations

import pytest
import torch

from tinkex.server.memory import out_of_memory
from tinkex.server.results import explained


def test_the_request_fails_with_what_it_needed_and_the_next_works(client, caplog):
    model = client.model()
    failed = client.result(client.forward_backward(model, 1, [668]))
    spoilt = client.result(client.optim_step(model, 2))
    good = client.result(client.forward_backward(model, 3, [5]))
    step = client.result(client.optim_step(model, 4))

    assert "it needs" in failed["error"]
    assert "send fewer or shorter sequences" in failed["error"]
    assert "user" == failed["category"]
    assert "gradients are incomplete" in spoilt["error"]
    assert "metrics" in good
    assert "metrics" in step
    assert any("ForwardBackward (operation 1)" in r.getMessage() for r in caplog.records)


def test_what_torch_raises_is_recognised():
    """The allocator of the CPU, as it is."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    sentence, category = explained(caught.value)

    assert f"it needs {2**30} MiB of memory at once, and " in sentence
    assert "MiB were free" in sentence
    assert "alloc_cpu" not in sentence
    assert "user" == category


def test_what_a_gpu_raises_is_recognised():
    text = (
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB "
        "of which 512.50 MiB is free. Process 1 has 78.6 GiB memory in use."
    )
    sentence = out_of_memory(torch.OutOfMemoryError(text))

    assert sentence is not None
    assert "it needs 20480 MiB of memory at once, and 512 MiB were free" in sentence


@pytest.mark.parametrize("exc", [RuntimeError("a bug"), ValueError("out of memory"), OSError(12)])
def test_other_failures_are_not(exc):
    assert out_of_memory(exc) is None
