"""`npu-compiler diff`."""

from __future__ import annotations

import argparse

from npu_compiler.commands import BUNDLE, print_json

HELP = "what differs between two bundles, the first difference first; exits 1 then"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The two bundles."""
    parser.add_argument("left", help=BUNDLE)
    parser.add_argument("right", help="the other one: of another version, machine, rank or set of options")


def run(parsed: argparse.Namespace) -> int:
    """Prints what differs between two bundles; returns 1 when something does."""
    from npu_compiler.inspect import bundle
    from npu_compiler.inspect.diff import differences

    left, right = bundle.open(parsed.left), bundle.open(parsed.right)
    found = differences(left, right)
    same_rank = left.header.environment.rank == right.header.environment.rank
    if parsed.json:
        print_json(found)
    else:
        print("\n".join(map(str, found)) or f"nothing differs but {'times' if same_rank else 'the rank, and times'}")
    return 1 if found else 0
