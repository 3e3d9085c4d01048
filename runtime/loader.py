"""Decides which CANN a process uses, and loads the host runtime when it is ours.

RULE below is the rule; `npu-compiler doctor` prints it with its outcome.

The host runtime's libraries carry CANN's names. They are loaded before torch_npu's extension, so the dynamic linker
finds them by soname: neither `LD_LIBRARY_PATH` nor `torch_npu.libs/` (which torch_npu's DT_RPATH would search before
a card's CANN) is involved.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import os
import sys
from dataclasses import dataclass
from pathlib import Path

RULE = (
    "NPU_COMPILER_RUNTIME=host, =host:FOLDER (another build of it) or =cann decides; otherwise an installed CANN is "
    "used (libascendcl.so under $ASCEND_HOME_PATH, $ASCEND_TOOLKIT_HOME or a folder of $LD_LIBRARY_PATH); otherwise "
    "the host runtime"
)
TORCH_NPU = "2.13.0"  # the release whose calls into CANN the host runtime answers
LIBRARY_FOLDER = Path(__file__).parent / "lib"
# In the order in which they depend on each other. libopapi needs libtorch, so torch is imported first.
LIBRARIES = (
    "libascendcl.so",
    "libacl_op_compiler.so",
    "libge_runner.so",
    "libgraph.so",
    "libacl_tdt_channel.so",
    "libhccl.so",
    "libhcomm.so",
    "libopapi.so",
    "libnnopbase.so",
)
LAUNCH_QUEUE, DIRECT = "TASK_QUEUE_ENABLE", "0"
"""torch_npu's queue hides what a launch on a card costs behind Python. A launch on the host costs less than the way
through the queue, one of whose two threads polls for as long as the process lives; so it is off, unless asked for."""


@dataclass(frozen=True)
class Choice:
    """Which CANN, and why. `folder` is where its libascendcl.so is."""

    runtime: str  # "host" or "cann"
    reason: str
    folder: Path


def find_cann() -> tuple[Path, str] | None:
    """The folder of an installed CANN's libascendcl.so and the variable that named it, or None."""
    candidates = [
        (Path(os.environ[variable]) / sub, f"${variable}")
        for variable in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
        if os.environ.get(variable)
        for sub in ("lib64", "runtime/lib64")
    ]
    candidates += [
        (Path(entry), "$LD_LIBRARY_PATH") for entry in os.environ.get("LD_LIBRARY_PATH", "").split(":") if entry
    ]
    for folder, source in candidates:
        if folder.resolve() != LIBRARY_FOLDER.resolve() and (folder / "libascendcl.so").exists():
            return folder, source
    return None


def choose() -> Choice:
    """Applies RULE without loading anything.

    Raises:
        RuntimeError: NPU_COMPILER_RUNTIME has an unknown value, or asks for a CANN that is not installed.
    """
    asked = os.environ.get("NPU_COMPILER_RUNTIME", "auto")
    wanted, _, build = asked.partition(":")
    if wanted not in ("auto", "host", "cann") or (build and wanted != "host"):
        raise RuntimeError(f"NPU_COMPILER_RUNTIME={asked!r}: expected auto, host, host:FOLDER or cann")
    if wanted == "host":
        return Choice("host", f"NPU_COMPILER_RUNTIME={asked}", Path(build) if build else LIBRARY_FOLDER)
    found = find_cann()
    if found is not None:
        folder, source = found
        return Choice("cann", f"libascendcl.so found through {source}", folder)
    if wanted == "cann":
        raise RuntimeError(
            "NPU_COMPILER_RUNTIME=cann, but no libascendcl.so lies under $ASCEND_HOME_PATH, $ASCEND_TOOLKIT_HOME or "
            "$LD_LIBRARY_PATH. Source CANN's set_env.sh, or unset NPU_COMPILER_RUNTIME to use the host runtime."
        )
    return Choice("host", "no CANN installation found", LIBRARY_FOLDER)


def missing_libraries(folder: Path) -> list[str]:
    """Names of the libraries of CANN that are not in `folder`."""
    return [name for name in LIBRARIES if not (folder / name).exists()]


def load() -> Choice:
    """Chooses, and loads the host runtime if chosen. Called once, before torch_npu's extension is loaded.

    Raises:
        RuntimeError: the host runtime is chosen but was not, or only partly, built, or does not fit this torch_npu.
    """
    choice = choose()
    if choice.runtime == "host":
        _require_torch_npu()
        missing = missing_libraries(choice.folder)
        if missing:
            raise RuntimeError(
                f"npu-compiler's host runtime is not complete: {', '.join(missing)} missing in {choice.folder}. "
                "Build it with `make setup` (or reinstall the wheel)."
            )
        _import_torch_without_backends()
        for name in LIBRARIES:
            ctypes.CDLL(str(choice.folder / name), mode=ctypes.RTLD_GLOBAL)
        os.environ.setdefault(LAUNCH_QUEUE, DIRECT)
    return choice


def _require_torch_npu() -> None:
    version = importlib.metadata.version("torch_npu")
    if version.split("+")[0] != TORCH_NPU:
        raise RuntimeError(
            f"npu-compiler's host runtime answers torch_npu {TORCH_NPU}, and torch_npu {version} is installed; their "
            f"calls into CANN differ. Install the release that fits: pip install torch_npu=={TORCH_NPU}"
        )


def _import_torch_without_backends() -> None:
    """Brings libtorch into the process. Does nothing while torch is being imported and calls us through torch_npu."""
    if "torch" in sys.modules:
        return
    before = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD")
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    try:
        importlib.import_module("torch")
    finally:
        if before is None:
            del os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"]
        else:
            os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = before
