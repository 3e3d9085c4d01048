"""`npu-compiler explain-miss`."""

from __future__ import annotations

import argparse
import json

NEWEST = 10
HELP = "why functions were compiled instead of taken from the cache"
DESCRIPTION = (
    "For each compiled program in the cache: the place in the code, and what differed from the nearest "
    f"program that was stored before it; the newest {NEWEST}, the oldest of these first. "
    "$NPU_COMPILER_CACHE names the cache's folder."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which of the programs."""
    parser.add_argument("name", nargs="?", default="", help="only programs with this in their name, a file's name, say")
    parser.add_argument("--all", action="store_true", help=f"all of them, not the newest {NEWEST}")


def run(parsed: argparse.Namespace) -> int:
    """Prints what is stored and why each of it had been missed; as JSON with all parts of the keys."""
    from npu_compiler import cache

    stored = [entry for entry in cache.ProgramCache(cache.folder()).entries() if parsed.name in entry["name"]]
    entries = stored if parsed.all else stored[-NEWEST:]
    if parsed.json:
        print(json.dumps(entries, indent=1))
        return 0
    for entry in entries:
        print("\n".join([entry["name"], *(f"  {line}" for line in entry["missed"])]))
    if len(stored) > len(entries):
        print(f"{len(stored) - len(entries)} older ones: --all")
    if not entries:
        print(f"nothing is stored in {cache.folder()}" + (f" with {parsed.name!r} in its name" if parsed.name else ""))
    return 0
