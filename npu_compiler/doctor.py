"""What is installed, which CANN is used and why, and what will not work: the facts behind `npu-compiler doctor`.

Each check is a function that returns findings and lets none of the others down: the doctor must work where torch
cannot be imported.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from npu_compiler.runtime import loader

PINNED = {"torch": "2.13.0", "torch_npu": loader.TORCH_NPU, "vllm": "0.32.0"}
OPTIONAL = {"vllm"}
# Runs in a process of its own: a broken torch_npu must not end the doctor.
DEVICE_PROBE = """
import torch
torch.npu.init()  # is_available() would only say no
x = torch.arange(4, device="npu") + 1
assert x.cpu().tolist() == [1, 2, 3, 4], x.cpu().tolist()
free, total = torch.npu.mem_get_info()
print(f"{torch.npu.device_count()} x {torch.npu.get_device_name(0)}, {total / 2**30:.0f} GiB each; an addition ran")
"""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report. `state` is "ok", "note" or "error"; `advice` says what to do next."""

    topic: str
    state: str
    text: str
    advice: str = ""


def examine() -> list[Finding]:
    """Runs every check; takes a few seconds, most of it one import of torch in a subprocess."""
    return [*_machine(), *_packages(), *_runtime(), *_start_up_hook(), *_device()]


def as_text(findings: list[Finding]) -> str:
    """The report as lines to paste into a bug report."""
    mark = {"ok": "ok   ", "note": "note ", "error": "ERROR"}
    lines = []
    for finding in findings:
        lines.append(f"[{mark[finding.state]}] {finding.topic}: {finding.text}")
        if finding.advice:
            lines.append(f"        -> {finding.advice}")
    return "\n".join(lines)


def _machine() -> Iterator[Finding]:
    text = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}"
    if sys.version_info[:2] == (3, 11):
        yield Finding("machine", "ok", text)
    else:
        yield Finding("machine", "error", text, "npu-compiler is built and tested with Python 3.11 only")


def _packages() -> Iterator[Finding]:
    for name, wanted in PINNED.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            state = "note" if name in OPTIONAL else "error"
            yield Finding(name, state, "not installed", f"install {name} {wanted} (`make setup` does)")
            continue
        if version.split("+")[0] == wanted:
            yield Finding(name, "ok", version)
        else:
            yield Finding(name, "error", f"{version}, but {wanted} is needed", f"install {name}=={wanted}")


def _runtime() -> Iterator[Finding]:
    try:
        choice = loader.choose()
    except RuntimeError as error:
        yield Finding("CANN", "error", str(error))
        return
    name = "the host runtime (CANN's interface on the CPU)" if choice.runtime == "host" else "an installed CANN"
    yield Finding("CANN", "ok", f"{name}, because {choice.reason}; {choice.folder}")
    yield Finding("rule", "ok", loader.RULE)
    if choice.runtime == "host":
        missing = loader.missing_libraries()
        if missing:
            yield Finding("host runtime", "error", f"not built: {', '.join(missing)}", "run `make setup`")
        else:
            yield Finding("host runtime", "ok", f"all {len(loader.LIBRARIES)} libraries are there")
        settings = os.environ.get("NPU_COMPILER_HOST", "")
        yield Finding("host devices", "ok", f"NPU_COMPILER_HOST={settings!r}" if settings else "default settings")
    shadow = _torch_npu_libs()
    if shadow:
        yield Finding(
            "torch_npu.libs",
            "note",
            f"{shadow} holds CANN libraries; torch_npu's DT_RPATH searches it before LD_LIBRARY_PATH",
            "nothing of npu-compiler's lies there; remove it unless you put it there on purpose",
        )


def _torch_npu_libs() -> Path | None:
    spec = importlib.util.find_spec("torch_npu")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent.parent / "torch_npu.libs"
    return folder if folder.is_dir() and any(folder.glob("libascendcl.so*")) else None


def _start_up_hook() -> Iterator[Finding]:
    if "npu_compiler.runtime.hook" in sys.modules:  # nothing but the .pth imports it
        yield Finding("start-up hook", "ok", "`import torch` brings up torch.npu with nothing set by hand")
    else:
        yield Finding(
            "start-up hook",
            "error",
            "npu_compiler_runtime.pth did not run in this interpreter, so torch_npu will not find CANN's libraries",
            "install npu-compiler with pip (a plain PYTHONPATH does not run .pth files)",
        )


def _device() -> Iterator[Finding]:
    probe = subprocess.run(
        [sys.executable, "-c", DEVICE_PROBE], capture_output=True, text=True, timeout=120, check=False
    )
    if probe.returncode == 0:
        yield Finding("torch.npu", "ok", probe.stdout.strip().splitlines()[-1])
    else:
        lines = probe.stderr.strip().splitlines() or [f"exit code {probe.returncode}"]
        own = [line for line in lines if line.startswith("[host runtime]")]
        yield Finding(
            "torch.npu", "error", (own or lines)[-1], "the full message: python -c 'import torch; torch.npu.init()'"
        )
