"""The `npu-compiler` command."""

from __future__ import annotations

import argparse
import json
import sys

from npu_compiler import __version__


def main(arguments: list[str] | None = None) -> int:
    """Runs one subcommand and returns its exit code."""
    parser = argparse.ArgumentParser(prog="npu-compiler", description="Tools of the ascend backend of torch.compile.")
    parser.add_argument("--version", action="version", version=f"npu-compiler {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor = commands.add_parser(
        "doctor",
        help="what is installed, which CANN is used and why, and what will not work",
        description="Prints what is installed, which CANN is used and why, and what will not work. "
        "Exits 1 when something needed is missing.",
    )
    doctor.add_argument("--json", action="store_true", help="print the same facts as JSON")
    explain = commands.add_parser(
        "explain-miss",
        help="why functions were compiled instead of taken from the cache",
        description="For each compiled program in the cache: the place in the code, and what differed from the nearest "
        "program that was stored before it. $NPU_COMPILER_CACHE names the cache's folder.",
    )
    explain.add_argument("--json", action="store_true", help="print the same facts, and all parts of the keys, as JSON")
    parsed = parser.parse_args(arguments)
    if parsed.command == "explain-miss":
        return run_explain_miss(as_json=parsed.json)
    return run_doctor(as_json=parsed.json)


def run_doctor(as_json: bool) -> int:
    """Prints the doctor's findings; returns 1 when one of them is an error."""
    from npu_compiler import doctor

    findings = doctor.examine()
    if as_json:
        print(json.dumps([finding.__dict__ for finding in findings], indent=1))
    else:
        print(doctor.as_text(findings))
    return 1 if any(finding.state == "error" for finding in findings) else 0


def run_explain_miss(as_json: bool) -> int:
    """Prints what is stored and why each of it had been missed."""
    from npu_compiler import cache

    entries = cache.ProgramCache(cache.folder()).entries()
    if as_json:
        print(json.dumps(entries, indent=1))
        return 0
    for entry in entries:
        print("\n".join([entry["name"], *(f"  {line}" for line in entry["missed"])]))
    if not entries:
        print(f"nothing is stored in {cache.folder()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
