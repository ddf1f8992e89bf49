"""Memory runs out in one model's pass: its request fails with the reason, the next ones work."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time

import psutil
import pytest
import torch

from tests.support.processes import ServerProcess
from tests.support.wire_client import batch
from tinkex import wire
from tinkex.server import memory
from tinkex.server.memory import out_of_memory
from tinkex.server.results import explained


def test_the_request_fails_with_what_it_needed_and_the_next_works(client, caplog):
    model = client.model()
    failed = client.result(client.forward_backward(model, 1, [668]))
    refused = client.result(client.optim_step(model, 2))
    good = client.result(client.forward_backward(model, 3, [5]))
    step = client.result(client.optim_step(model, 4))

    assert "it needs" in failed["error"]
    assert "send fewer or shorter sequences" in failed["error"]
    assert "user" == failed["category"]
    assert "gradients are incomplete" in refused["error"]
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


@pytest.mark.parametrize(
    "models, bodies",
    [
        pytest.param(20, 12, id="quick"),
        pytest.param(60, 12, id="long", marks=pytest.mark.slow),
    ],
)
def test_memory_comes_back_after_a_storm_of_models_samplers_and_large_bodies(
    tmp_path, models, bodies
):
    """Models of rank 32 with a sampler each, and batches of 30 MB that wait.

    200 models used to leave 3 GB, 40 bodies of 40 MB 1.9 GB.
    """
    limits = {"idle_model_seconds": 2.0, "trim_seconds": 1.0, "reap_seconds": 0.2}
    server = ServerProcess(tmp_path / "home", real=True, limits=limits)
    server.start()
    client, process = server.client, psutil.Process(server.process.pid)

    def storm(models, bodies):
        """Peak of the memory while it lasts."""
        session, peak = client.session(), 0
        for number in range(models):
            model = client.model(session, number, rank=32)
            client.result(client.forward_backward(model, 1, [5] * 50))
            client.result(client.optim_step(model, 2))
            path = client.result(client.save_for_sampler(model, 3, "s"))["path"]
            sampler = client.sampler(session, number, model_path=path)
            client.result(client.sample(sampler, 0))
            peak = max(peak, process.memory_info().rss)
        # Operation 4 never comes, so all these wait.
        for seq in range(5, 5 + bodies):
            _, kind, _, body = wire.encode_request(batch(model, seq, *[[5] * 2000] * 1000), True)
            client.send_batch("forward_backward", kind, body)
            peak = max(peak, process.memory_info().rss)
        waiting = process.memory_info().rss
        client.post(f"sessions/{session}/finish", {"reason": {"type": "success"}})
        return peak, waiting, len(body)

    def settled():
        """The memory once nothing has changed for a while."""
        readings = [0]
        while len(readings) < 60:
            time.sleep(0.1)
            readings.append(process.memory_info().rss)
            if len(readings) > 30 and max(readings[-15:]) < 1.02 * min(readings[-15:]):
                break
        return readings[-1]

    def back_at(size, seconds=20):
        """The memory once it is at most *size*, or after *seconds*."""
        deadline = time.monotonic() + seconds
        while (now := process.memory_info().rss) >= size and time.monotonic() < deadline:
            time.sleep(0.05)
        return now

    storm(2, 1)
    start = settled()
    peak, waiting, size = storm(models, bodies)
    end = back_at(1.2 * start)
    server.close()
    print(f"start {start >> 20} MiB, peak {peak >> 20} MiB, end {end >> 20} MiB; {size} bytes each")

    assert end < 1.2 * start
    assert waiting < start + 6 * size + 300 * 2**20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_what_a_thread_has_freed_goes_back_to_the_system():
    """Of the end of its arena, too, with malloc as the engine sets it."""
    code = textwrap.dedent("""
        import ctypes, threading
        import psutil
        from tinkex.server import memory

        memory.use_one_arena()
        malloc = ctypes.CDLL(None)
        malloc.mallopt(-4, 0), malloc.mallopt(-1, 2**31 - 1)  # see engine.memory
        held = []
        done = threading.Event()

        def work():
            held.append(bytes([7]) * (40 << 20))  # at most 64 MiB fit in another arena
            held.clear()
            done.set()
            threading.Event().wait()

        before = psutil.Process().memory_info().rss
        threading.Thread(target=work, daemon=True).start()
        done.wait()
        memory.trim()
        print((psutil.Process().memory_info().rss - before) >> 20)
    """)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)

    assert int(done.stdout) < 10  # MiB


def test_on_a_system_that_does_not_say_what_is_free_the_sentence_does_not_either(monkeypatch):
    text = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4194304 bytes."
    monkeypatch.setattr(memory.Path, "read_text", lambda *arguments, **named: "no such fields")

    assert "it needs 4 MiB of memory at once, more than there is; send" in out_of_memory(
        RuntimeError(text)
    )
    assert "it needs more memory than there is; send" in out_of_memory(MemoryError())
