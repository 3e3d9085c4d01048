"""Compiling the C++ sources of this folder, for contestants that are no Python."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

from benchmarks.harness import Missing

HERE = Path(__file__).parent
LIBRARIES = HERE.parent / "runtime/lib"


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise Missing(f"{name} is not installed; run `make setup`")
    return Path(found.submodule_search_locations[0])


def compiled(source: str, target: Path, *arguments: str) -> Path:
    """Compiles `source` of this folder to `target`, with torch's and CANN's headers and against torch's libraries.

    Args:
        arguments: to the compiler, behind the source.

    Raises:
        Missing: there is no C++ compiler ($CXX, else c++), or it refuses the source; its error is in the message.
    """
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise Missing(f"no C++ compiler {compiler!r}; install g++ (Debian: apt install g++) or set CXX")
    torch, cann = package("torch"), package("torch_npu") / "include/third_party/acl/inc"
    command = [compiler, "-std=c++17", "-O2", f"-I{HERE.parent}", "-isystem", str(torch / "include")]
    command += ["-isystem", str(cann), str(HERE / source), "-o", str(target), *arguments]
    command += [f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}", f"-Wl,-rpath-link,{torch / 'lib'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        raise Missing(f"{source} does not compile: {(errors or ['no message'])[0]}")
    return target
