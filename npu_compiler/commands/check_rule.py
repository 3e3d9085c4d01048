"""`npu-compiler check-rule`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from npu_compiler.commands import print_json

HELP = "whether rules of yours are right: their examples against their references, their near misses"
DESCRIPTION = (
    "Runs each rule on its example in each of its dtypes, and compares the result on the device with its reference in "
    "float64; then on its near misses, which it has to leave alone. The exit code is 1 where something is wrong."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which rules."""
    parser.add_argument(
        "rules",
        nargs="+",
        metavar="MODULE:NAME",
        help="a rule, or a list of them, as the option `rules` takes it; modules are found in the working folder too",
    )


def run(parsed: argparse.Namespace) -> int:
    """Prints a line a program, as it is checked, and what is wrong below it."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    from npu_compiler.inspect.check_rule import check_rule, rules_named

    findings = []
    for rule in rules_named(parsed.rules):
        for finding in check_rule(rule):
            findings.append(finding)
            if not parsed.json:
                print(finding, flush=True)
        if not parsed.json and not rule.near_misses:
            print(f"{rule.name}: it names no near_misses, programs on which it must not fire")
    wrong = [finding for finding in findings if finding.faults]
    if parsed.json:
        print_json(findings)
    else:
        print(f"{len(findings) - len(wrong)} of {len(findings)} programs are as they should be")
    return 1 if wrong else 0
