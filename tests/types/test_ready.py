"""Values that can be waited for like the futures of the official SDK."""

from __future__ import annotations

import asyncio

import attrs
import pytest

from tinkex import types


@attrs.frozen
class Value(types.Ready):
    number: int


def test_a_value_is_its_own_future():
    value = Value(5)

    async def awaited():
        return await value, await value.result_async(1.0), await asyncio.gather(value)

    assert value is value.result() is value.result(timeout=0.0)
    assert (value, value, [value]) == asyncio.run(awaited())


def test_a_value_keeps_its_slots():
    """A base class without slots would let any misspelt attribute be set."""
    with pytest.raises(AttributeError):
        object.__setattr__(Value(5), "numbr", 6)


def test_a_call_without_a_value_is_done_with_none():
    async def awaited():
        return await types.Done(), await types.Done().result_async()

    assert types.Done().result() is None
    assert (None, None) == asyncio.run(awaited())
    assert "<done>" == repr(types.Done())
