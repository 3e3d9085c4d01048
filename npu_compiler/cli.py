"""The `npu-compiler` command. What each subcommand does is in npu_compiler/commands."""

from __future__ import annotations

import argparse
import importlib
import sys

from npu_compiler import __version__
from npu_compiler.errors import BundleError, OptionError, TraceError

COMMANDS = (
    "doctor",
    "explain-miss",
    "check-rule",
    "show",
    "why",
    "why-eager",
    "why-recapture",
    "diff",
    "replay",
    "bisect",
    "minify",
    "inspect",
    "trace",
)


def main(arguments: list[str] | None = None) -> int:
    """Runs one subcommand and returns its exit code; 2 is a file that can't be read, or an unknown argument."""
    parser = argparse.ArgumentParser(prog="npu-compiler", description="Tools of the ascend backend of torch.compile.")
    parser.add_argument("--version", action="version", version=f"npu-compiler {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"npu_compiler.commands.{name.replace('-', '_')}")
        description = getattr(module, "DESCRIPTION", f"Prints {module.HELP}.")
        command = commands.add_parser(name, help=module.HELP, description=description)
        module.add_arguments(command)
        command.add_argument("--json", action="store_true", help="print the same data as JSON")
        command.set_defaults(run=module.run)
    parsed = parser.parse_args(arguments)
    try:
        return int(parsed.run(parsed))
    except (BundleError, OptionError, TraceError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
