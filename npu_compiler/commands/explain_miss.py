"""`npu-compiler explain-miss`."""

from __future__ import annotations

import argparse
import json

HELP = "why functions were compiled instead of taken from the cache"
DESCRIPTION = (
    "For each compiled program in the cache: the place in the code, and what differed from the nearest "
    "program that was stored before it. $NPU_COMPILER_CACHE names the cache's folder."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has none of its own."""


def run(parsed: argparse.Namespace) -> int:
    """Prints what is stored and why each of it had been missed; as JSON with all parts of the keys."""
    from npu_compiler import cache

    entries = cache.ProgramCache(cache.folder()).entries()
    if parsed.json:
        print(json.dumps(entries, indent=1))
        return 0
    for entry in entries:
        print("\n".join([entry["name"], *(f"  {line}" for line in entry["missed"])]))
    if not entries:
        print(f"nothing is stored in {cache.folder()}")
    return 0
