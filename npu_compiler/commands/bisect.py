"""`npu-compiler bisect`."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

from npu_compiler.commands import print_json, running
from npu_compiler.errors import BundleError

HELP = "find the pass, the rule and the match, or the later layer and call, that makes a dumped program wrong"
DESCRIPTION = (
    f"Compiles a dumped program step by step, and finds by halving the step that makes it wrong or end in an error. "
    f"{running.RUNS_CODE} {running.CODES}"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to look at, and whether to go on with a smaller program."""
    running.add_arguments(parser)
    parser.add_argument(
        "--minify", default="", metavar="FILE", help="and write the smallest program as a test, as minify"
    )


@contextlib.contextmanager
def _said() -> Iterator[None]:
    """Why there is no smaller program is said; the cause is printed all the same."""
    try:
        yield
    except BundleError as error:
        running.say(str(error))


def run(parsed: argparse.Namespace) -> int:
    """Prints the cause."""
    from npu_compiler.inspect import smallest
    from npu_compiler.inspect.program import Data

    found: list[Data] = []
    try:
        with running.worker_of(parsed) as (worker, source):
            cause = smallest.find(source, worker, running.say)
            found.append(cause)
            if parsed.minify and cause.layer != "nothing":
                with _said():
                    found.append(smallest.minify(source, cause, worker, Path(parsed.minify), running.say))
    except KeyboardInterrupt:
        return running.INTERRUPTED
    if parsed.json:
        print_json(found)
    else:
        print("\n".join(map(str, found)))
    return running.RIGHT if cause.layer == "nothing" else running.WRONG
