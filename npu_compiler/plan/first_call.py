"""What is done once, in front of a program's first call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def before_first(call: Callable[..., Any], do: Callable[[Sequence[Any]], bool]) -> Callable[..., Any]:
    """`call`, which hands its arguments to `do` first, at each call until that says that it is done. What `do` raises
    ends the call, and the next one asks it again."""
    waiting = True

    def with_first(*args: Any) -> Any:
        nonlocal waiting
        if waiting:
            waiting = not do(args)
        return call(*args)

    return with_first
