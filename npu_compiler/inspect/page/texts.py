"""What the page holds once: texts by number, and columns of numbers in place of a record for each call."""

from __future__ import annotations

from npu_compiler.inspect.program import Argument, Items, Named, Result


class Texts:
    """Texts by number, each kept once. Number 0 is the empty one."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {"": 0}

    def __call__(self, text: str) -> int:
        return self._numbers.setdefault(text, len(self._numbers))

    @property
    def all(self) -> list[str]:
        return list(self._numbers)


def argument_text(argument: Argument) -> str:
    """An argument as it reads in a program: short, for people."""
    match argument:
        case Result():
            return argument.name
        case Named():
            return argument.text.removeprefix("torch.")
        case Items(kind="mapping"):
            pairs = zip(argument.keys, argument.items, strict=True)
            return "{" + ", ".join(f"{key}: {argument_text(item)}" for key, item in pairs) + "}"
        case Items(kind="slice"):
            return ":".join("" if item is None else argument_text(item) for item in argument.items)
        case Items():
            inner = ", ".join(map(argument_text, argument.items))
            return f"[{inner}]" if argument.kind == "list" else f"({inner})"
    return repr(argument)
