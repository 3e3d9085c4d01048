"""`npu-compiler minify`."""

from __future__ import annotations

import argparse

from npu_compiler.commands import bisect, running

HELP = "bisect, then shrink the program to a few calls and write a test of it"
DESCRIPTION = (
    "Does what bisect does, and writes the smallest program that shows it as a test. "
    f"{running.RUNS_CODE} {running.CODES}"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to look at, and where to write."""
    running.add_arguments(parser)
    parser.add_argument("--to", dest="minify", default="test_minified.py", metavar="FILE",
                        help="the test (default: test_minified.py)")  # fmt: skip


def run(parsed: argparse.Namespace) -> int:
    """Prints the cause and the test's name."""
    return bisect.run(parsed)
