"""Values with the methods of a future, for scripts that call result() on every returned value.

The official SDK returns futures where tinkex returns the value itself. `client.get_session(id)` and
`client.get_session(id).result()` are therefore equivalent, and both can be awaited.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeVar

__all__ = [
    "Done",
    "Ready",
]

R = TypeVar("R", bound="Ready")


class Ready:
    """Base of values that are also their own finished future."""

    __slots__ = ()

    def result(self: R, timeout: float | None = None) -> R:
        """The value itself, at once."""
        return self

    async def result_async(self: R, timeout: float | None = None) -> R:
        """The value itself, at once, in a coroutine."""
        return self

    def __await__(self: R) -> Generator[Any, None, R]:
        return self
        yield  # makes it a generator, which `await` needs


class Done:
    """The return value of successful calls without a value; its `result()` is None."""

    __slots__ = ()

    def result(self, timeout: float | None = None) -> None:
        """None, at once."""

    async def result_async(self, timeout: float | None = None) -> None:
        """None, at once, in a coroutine."""

    def __await__(self) -> Generator[Any, None, None]:
        return None
        yield  # makes it a generator, which `await` needs

    def __repr__(self) -> str:
        return "<done>"
