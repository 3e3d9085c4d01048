"""Preparing the virtual environment: two at once in one folder take turns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def holding(lock: Path, work: str) -> subprocess.Popen[str]:
    """A process that does `work` while it holds `lock`."""
    program = f"from pathlib import Path\nfrom tools.setup_environment import alone\nwith alone(Path({str(lock)!r})):\n"
    return subprocess.Popen(
        [sys.executable, "-c", f"{program}    {work}"],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def test_a_second_setup_says_that_it_waits_and_goes_on_after_the_first(tmp_path: Path) -> None:
    lock = tmp_path / ".setup.lock"
    with holding(lock, "print('works', flush=True); input()") as first:
        assert first.stdout is not None and first.stdout.readline() == "works\n"
        with holding(lock, "print('works')") as second:
            assert second.stdout is not None
            said = second.stdout.readline()
            assert "another `make setup` is at work" in said and str(tmp_path) in said
            assert second.poll() is None
            first.communicate("\n")
            assert second.communicate(timeout=60)[0] == "works\n"
        assert second.returncode == 0


def test_a_setup_that_was_killed_holds_nobody_up(tmp_path: Path) -> None:
    lock = tmp_path / ".setup.lock"
    with holding(lock, "print('works', flush=True); input()") as first:
        assert first.stdout is not None and first.stdout.readline() == "works\n"
        first.kill()
    with holding(lock, "print('works')") as second:
        assert second.communicate(timeout=60)[0] == "works\n"
