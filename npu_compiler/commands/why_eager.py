"""`npu-compiler why-eager`."""

from __future__ import annotations

import argparse

from npu_compiler.commands import print_json

HELP = "which steps of a run were no replay, by reason, and what to change"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which run."""
    parser.add_argument(
        "record", metavar="run", help="a run report (report_path), a bundle, or a folder with those of a run's ranks"
    )


def run(parsed: argparse.Namespace) -> int:
    """Prints how many steps and calls were replays, and of the others each reason."""
    from npu_compiler.inspect.why_eager import summary, why_eager

    found = why_eager(parsed.record)
    if parsed.json:
        print_json(found)
    else:
        print("\n".join([summary(parsed.record), *map(str, found)]))
    return 0
