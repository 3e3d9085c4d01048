"""`npu-compiler replay`."""

from __future__ import annotations

import argparse

from npu_compiler.commands import print_json, running

HELP = "run a dumped graph alone on the device, and compare it with what it means"
DESCRIPTION = (
    "Compiles a dumped program again, calls it with saved or made-up inputs, and judges it. "
    f"{running.RUNS_CODE} {running.CODES}"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How far to go, and what to leave out."""
    running.add_arguments(parser)
    parser.add_argument("--stop-after", default="", metavar="PASS",
                        help="run only the passes up to this one, and no later layer; `lowered` runs none")  # fmt: skip
    parser.add_argument("--disable", action="append", default=[], metavar="RULE", help="leave out this rule")
    parser.add_argument("--reference", action="store_true", help="print each result's error against float64 too")


def run(parsed: argparse.Namespace) -> int:
    """Prints what came of it."""
    from npu_compiler.inspect.replay import point_up_to

    try:
        with running.worker_of(parsed) as (worker, source):
            outcome = worker.run(source, point_up_to(source.open(), parsed.stop_after, parsed.disable, source.chosen()))
    except KeyboardInterrupt:
        return running.INTERRUPTED
    if parsed.json:
        print_json([outcome])
    else:
        print("\n".join([str(outcome), *(f"  {entry}" for entry in outcome.compared if parsed.reference)]))
        if parsed.reference and outcome.on_device:
            print(f"  on the device, as the CPU has no kernel: {', '.join(outcome.on_device)}")
    return running.RIGHT if outcome.right else running.WRONG
