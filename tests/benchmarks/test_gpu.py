"""The part "gpu" where there is none; and its cases, which run on any device, at toy size."""

from __future__ import annotations

import sys

import pytest

from tests.benchmarks import __main__ as program
from tests.benchmarks import engine, machine


def test_without_a_gpu_the_part_ends_with_one_sentence(monkeypatch, capsys):
    """Nothing is written of it, and that is no failure."""
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    monkeypatch.setattr(program, "run_part", lambda *_: pytest.fail("a part was run"))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "gpu"])

    assert 0 == program.main()
    assert "-- gpu: there is no GPU here, not measured.\n" == capsys.readouterr().out


def test_training_and_decoding_are_measured_at_the_batch_sizes_that_are_asked_for():
    decoding = [f"decoding_{streams}" for streams in (1, 8, 64, 256)]

    assert ["training", "training_equal", *decoding] == list(engine.CASES_OF_GPU)


def test_decoding_in_blocks_gives_the_tokens_that_are_counted(tmp_path):
    """What a GPU would be timed with, on the tiny model."""
    bench = engine.Bench("tiny", tmp_path)
    bench.engine = engine.Engine(device="cpu", in_blocks=True)
    bench.engine.load_base(str(bench.base))
    bench.engine.open_sampler("s", str(bench.base), directory=bench.adapter)

    assert 8 * 5 == engine.ask(bench, engine.prompts_of([16] * 8, bench.vocab), 1, 5)
