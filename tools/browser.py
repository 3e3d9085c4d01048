"""Brings a Chromium for the browser tests of `npu-compiler inspect`, where none is installed: Debian's own package.

It takes root and apt-get, about 110 MB to download and 350 MB on the disk, and half a minute. CI calls it. Elsewhere
nothing is installed unasked: `make browser` does it, and without a browser those tests are skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
VARIABLE = "NPU_COMPILER_BROWSER"
"""The environment variable that names another Chromium."""


def find() -> str | None:
    """The path of a Chromium, or None."""
    given = os.environ.get(VARIABLE)
    return given or next((path for name in NAMES if (path := shutil.which(name))), None)


def main() -> int:
    """Installs Chromium where none is found; returns 1 where that can't be done."""
    if found := find():
        print(f"browser: {found}")
        return 0
    if not shutil.which("apt-get") or os.geteuid() != 0:
        print(f"browser: install Chromium (Debian's package chromium), or name one in ${VARIABLE}", file=sys.stderr)
        return 1
    started = time.monotonic()
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update"], ["install", "-y", "--no-install-recommends", "chromium", "fonts-dejavu-core"]):
        done = subprocess.run(
            ["apt-get", "-qq", *arguments], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(f"browser: apt-get {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}", file=sys.stderr)
            return 1
    print(f"browser: {find()}, installed in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
