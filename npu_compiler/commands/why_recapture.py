"""`npu-compiler why-recapture`."""

from __future__ import annotations

import argparse

from npu_compiler.commands import BUNDLE, print_json

HELP = "what was captured or compiled again, what had changed, and what to change"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which bundle."""
    parser.add_argument("bundle", help=f"{BUNDLE}, or a folder with those of a run's ranks")


def run(parsed: argparse.Namespace) -> int:
    """Prints each capture beyond the first of a size, by reason."""
    from npu_compiler.inspect.why_recapture import why_recapture

    found = why_recapture(parsed.bundle)
    if parsed.json:
        print_json(found)
    else:
        print("\n".join(map(str, found)) or "each size was captured once, each function compiled once")
    return 0
