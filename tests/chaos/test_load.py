"""Everything at once, for a few seconds; `make load` does the same for ten minutes."""

from __future__ import annotations

from tests.chaos import load


def test_clients_and_samples_at_once_lose_nothing(tmp_path):
    """Training and hundreds of samples in flight share a server; none waits for the other's end."""
    seen = load.measure(tmp_path / "home", clients=3, samples=300, seconds=3)

    assert [] == seen.errors
    assert seen.asked == seen.samples
    assert seen.asked >= 300
    assert seen.steps >= 3
    assert max(seen.small) < 15


def test_growth_is_seen():
    """The judgement on ten minutes of numbers: memory that rises to the end is not flat."""
    minutes = range(120)
    flat = [{"server_bytes": 500 * load.MIB + 10 * load.MIB * (at % 3)} for at in minutes]
    leaking = [{"server_bytes": (500 + at) * load.MIB} for at in minutes]

    assert load.is_flat(flat, "server_bytes")
    assert not load.is_flat(leaking, "server_bytes")
