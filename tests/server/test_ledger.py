"""Parts of the ledger, without HTTP."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.support.wire_client import batch
from tinkex import types, wire
from tinkex.server.ledger.ranges import Numbers
from tinkex.server.results import fingerprint


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=200))
def test_numbers_are_a_set(changes):
    """Stored as ranges, it behaves like a set."""
    numbers, reference = Numbers(), set()
    for add, number in changes:
        if add:
            numbers.add(number)
            reference.add(number)
        else:
            numbers.discard(number)
            reference.discard(number)

    assert reference == {number for number in range(-1, 42) if number in numbers}


def test_numbers_in_order_take_no_space():
    """A run of a million operations is one range."""
    numbers = Numbers()
    for number in [*range(0, 1000, 2), *range(1, 1000, 2)]:
        numbers.add(number)

    assert ([0], [999]) == (numbers._starts, numbers._ends)


def test_a_fingerprint_is_of_what_is_said():
    """It depends on all values of the request, but not on its encoding."""
    request = batch("m", 1, [1, 2], [3])
    _, kind, _, body = wire.encode_request(request, protobuf=True)
    written = wire.decode_request(kind, body)
    others = [
        batch("m", 1, [1, 2], [4]),
        batch("m", 2, [1, 2], [3]),
        batch("m", 1, [1], [2, 3]),
        batch("m", 1, [1, 2], [3], loss_fn="ppo"),
        batch("m", 1, [1, 2], [3], forward_only=True),
        types.OptimStepRequest("m", 1),
    ]

    assert fingerprint(request) == fingerprint(written)
    assert 7 == len({fingerprint(each) for each in [request, *others]})
