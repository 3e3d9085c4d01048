"""The commands of `npu-compiler`, a module each: HELP, DESCRIPTION where it says more, add_arguments and run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from npu_compiler.inspect.program import Data

BUNDLE = "a folder that option `dump` wrote, or a zip of it"


def add_graph(parser: argparse.ArgumentParser) -> None:
    """The argument of the commands that can look at one graph of a bundle."""
    parser.add_argument("--graph", default="", metavar="NAME", help="only this graph of the bundle")


def print_json(entries: Sequence[Data]) -> None:
    """Prints data of a bundle as a JSON list."""
    print(json.dumps([entry.model_dump(mode="json") for entry in entries], indent=1))
