"""`npu-compiler doctor`."""

from __future__ import annotations

import argparse
import json

HELP = "what is installed, which CANN is used and why, and what will not work"
DESCRIPTION = (
    "Prints what is installed, which CANN is used and why, and what will not work. "
    "Exits 1 when something needed is missing."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has none of its own."""


def run(parsed: argparse.Namespace) -> int:
    """Prints the doctor's findings; returns 1 when one of them is an error."""
    from npu_compiler import doctor

    findings = doctor.examine()
    if parsed.json:
        print(json.dumps([finding.__dict__ for finding in findings], indent=1))
    else:
        print(doctor.as_text(findings))
    return 1 if any(finding.state == "error" for finding in findings) else 0
