"""Printing and saving what the option `watch` notes, call by call."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from npu_compiler.errors import OptionError
from npu_compiler.fusion_kernels.watched import Notes, Seen

LINES = "notes.jsonl"
"""The file with a line for each note, which names the file of the value beside it, and its key there."""


class Output:
    """Prints and saves what was noted since it was asked last.

    Args:
        printed: one line a note; NaN and infinite ones of `nan` and `inf` once for each place that they come from.
        folder: for the files, which lie in `rankN/NAME` there, or `rankN/NAME.1` and so on where that is taken; empty:
            none are written.

    Raises:
        OptionError: the folder can't be made.
    """

    def __init__(self, printed: bool, folder: str, name: str) -> None:
        self._printed = printed
        self._folder = _new_folder(Path(folder), name) if folder else None
        self._next: dict[int, int] = {}
        self._told: set[tuple[str, str]] = set()
        self._lock = threading.Lock()

    def behind(self, call: Callable[..., Any], notes: Notes) -> Callable[..., Any]:
        """`call`, with what it noted told behind it; not while it is being captured, when nothing runs."""

        def told(*args: Any) -> Any:
            result = call(*args)
            if not torch.npu.is_current_stream_capturing():
                self.write([notes])
            return result

        return told

    def write(self, notes: Iterable[Notes]) -> None:
        """Tells what was noted in programs, which ran in this order. Waits for the device."""
        with self._lock:
            found = []
            for entry in notes:
                self._next[entry.number], seen = entry.since(self._next.get(entry.number, 0))
                found += seen
            if self._printed:
                for line in self._lines(found):
                    print(line, flush=True)
            if self._folder is not None and found:
                _save(self._folder, found)

    def _lines(self, found: Sequence[Seen]) -> Iterable[str]:
        spread: dict[str, list[Seen]] = {}
        for seen in found:
            if seen.what in ("nan", "inf"):
                spread.setdefault(seen.when, []).append(seen)
            else:
                yield f"watch {seen}"
        for when, (first, *others) in spread.items():
            if (first.place, first.node) not in self._told:
                self._told.add((first.place, first.node))
                yield _warning(when, first, others)


def _warning(when: str, first: Seen, others: Sequence[Seen]) -> str:
    kinds = ((first.nans, "NaN"), (first.infinite, "infinite"))
    held = " and ".join(f"{count} {kind}" for count, kind in kinds if count)
    later = {seen.node for seen in others} - {first.node}
    more = f"; {len(later)} later values of this call hold such, too" if later else ""
    return f"watch {when}: first {held} of {first.count} at {first.place or first.node}: {first.kind}{more}"


def _save(folder: Path, found: Sequence[Seen]) -> None:
    values: dict[str, dict[str, torch.Tensor]] = {}
    with (folder / LINES).open("a") as out:
        for seen in found:
            line = _line(seen)
            if seen.value is not None:
                file = f"call_{seen.call}.safetensors" if seen.step is None else f"step_{seen.step}.safetensors"
                own = values.setdefault(file, {})
                key = seen.node if seen.node not in own else f"{seen.graph}.{seen.node}"
                own[key] = seen.value.contiguous()
                line |= {"file": file, "key": key}
            out.write(json.dumps(line) + "\n")
    for file, tensors in values.items():
        save_file(tensors, folder / file)


def _line(seen: Seen) -> dict[str, Any]:
    known = dataclasses.asdict(dataclasses.replace(seen, value=None))
    del known["value"]
    return {**known, "dtype": str(seen.dtype).removeprefix("torch.")}


def _new_folder(parent: Path, name: str) -> Path:
    """A folder that was not there: no two processes or runs get the same one."""
    distributed = torch.distributed
    known = distributed.is_available() and distributed.is_initialized()
    ranked = parent / f"rank{distributed.get_rank() if known else os.environ.get('RANK', '0')}"
    try:
        ranked.mkdir(parents=True, exist_ok=True)
        for count in itertools.count():
            place = ranked / (f"{name}.{count}" if count else name)
            with contextlib.suppress(FileExistsError):
                place.mkdir()
                break
    except OSError as error:
        raise OptionError(
            f"watch_save={str(parent)!r}: {error}",
            rule="it is a folder that can be written or made",
            fix="name another one",
        ) from error
    return place
