"""Prepares the project's virtual environment. `make setup` calls it; it is quick when nothing changed.

Steps, each remembered by a hash of what it depends on (in `<venv>/.npu_compiler_setup.json`):
  torch        the CPU build of the pinned release, and what building vLLM needs
  vllm         from its source distribution, without device code (VLLM_TARGET_DEVICE=empty); needs no Rust
  torch_npu    the unmodified wheel (after vLLM, whose build imports torch and would load it)
  tools        test and lint tools
  project      this project, editable; builds the host runtime and a Python module with CMake
  bench        with --bench: the peers of the benchmarks that are not part of torch
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "runtime"
LOCK = ROOT / ".setup.lock"
NEEDED_BYTES = 8 << 30  # .venv takes 3 GB; pip and the build need the rest on the way
HEARTBEAT_S = 30
TORCH, TORCH_NPU, VLLM = "2.13.0", "2.13.0", "0.32.0"
BUILD_TOOLS = [
    "setuptools>=77,<81", "setuptools-scm", "setuptools-rust", "wheel", "packaging", "cmake", "ninja", "jinja2", "numpy"
]  # fmt: skip
TEST_TOOLS = [
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "hypothesis",
    "openai",
    "playwright==1.65.2",
    "triton; platform_machine == 'x86_64'",
    "ruff",
    "mypy",
    "clang-format==23.1.5",
    "types-PyYAML",
]
# With versions: a ratio to another release of a peer is another ratio.
BENCH_TOOLS = ["onnx==1.23.2", "onnxscript==0.7.2", "onnxruntime==1.31.1", "openvino==2026.4.1", "matplotlib"]


@dataclass(frozen=True)
class Step:
    """One `pip install`. It runs again when its arguments or one of `inputs` change."""

    name: str
    arguments: list[str]
    environment: dict[str, str]
    inputs: list[Path]
    outputs: list[Path]
    duration: str

    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps([self.arguments, self.environment]).encode())
        for path in self.inputs:
            digest.update(path.read_bytes())
        return digest.hexdigest()


def steps(bench: bool) -> list[Step]:
    # pip must not replace the CPU build of torch when another package asks for torch.
    pin = ["--constraint", str(ROOT / "tools" / "constraints.txt")]
    vllm_environment = {"VLLM_TARGET_DEVICE": "empty", "VLLM_VERSION_OVERRIDE": VLLM}
    peers = [Step("bench", [*BENCH_TOOLS, *pin], {}, [], [], "1 min")] if bench else []
    return [
        Step("torch", [f"torch=={TORCH}", *BUILD_TOOLS, *pin], {}, [], [], "1 min"),
        Step(
            "vllm",
            ["--no-build-isolation", "--no-binary", "vllm", f"vllm=={VLLM}", *pin],
            vllm_environment,
            [],
            [],
            "2 min",
        ),
        Step("torch_npu", [f"torch_npu=={TORCH_NPU}", *pin], {}, [], [], "10 s"),
        Step("tools", [*TEST_TOOLS, *pin], {}, [], [], "20 s"),
        Step(
            "project",
            ["--no-build-isolation", "--editable", ".", *pin],
            {},
            [ROOT / "setup.py", ROOT / "pyproject.toml"],
            [
                BUILD / "build.ninja",
                ROOT / "runtime" / "lib" / "libopapi.so",
                ROOT / "npu_compiler" / "aclgraph" / f"graph_inputs{sysconfig.get_config_var('EXT_SUFFIX')}",
            ],
            "4 min on two idle cores: compiles the host runtime",
        ),
        *peers,
    ]


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Waits until no other process is in here with the file `lock`: two at once would break each other's packages and
    build. The system gives the lock back when a process ends, however it ends."""
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another `make setup` is at work in {lock.parent}; waiting until it is done")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def prepare(venv: Path, bench: bool) -> None:
    python = venv / "bin" / "python"
    record_file = venv / ".npu_compiler_setup.json"
    if not python.exists():
        say(f"creating {venv}")
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    record: dict[str, str] = json.loads(record_file.read_text()) if record_file.exists() else {}
    done_before = True
    for step in steps(bench):
        # A step that ran again may have changed what later ones build on.
        if done_before and record.get(step.name) == step.fingerprint() and all(p.exists() for p in step.outputs):
            continue
        done_before = False
        say(f"{step.name} ({step.duration})")
        started = time.monotonic()
        environment = {**os.environ, **step.environment, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
        environment["PATH"] = f"{venv / 'bin'}{os.pathsep}{environment['PATH']}"
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *step.arguments]
        if run(command, environment, started):
            raise SystemExit(f"setup: the step {step.name!r} failed; its command was:\n  {' '.join(command)}")
        record[step.name] = step.fingerprint()
        record_file.write_text(json.dumps(record, indent=1))
        say(f"{step.name} done in {time.monotonic() - started:.0f} s")
    # Ninja knows what changed since; it says nothing and returns at once when that is nothing.
    subprocess.run([str(venv / "bin" / "cmake"), "--build", str(BUILD), "--", "--quiet"], check=True)


def run(command: list[str], environment: dict[str, str], started: float) -> int:
    """Runs a step and says now and then that it lives, as pip is silent; returns its exit code."""
    with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
        while True:
            try:
                return process.wait(HEARTBEAT_S)
            except subprocess.TimeoutExpired:
                say(f"  {time.monotonic() - started:.0f} s{compiled_since(started)}")
            except KeyboardInterrupt:
                process.wait()  # pip got the signal as well
                raise


def compiled_since(started: float) -> str:
    """How many files of the host runtime have been compiled since `started` (monotonic seconds), as text."""
    begin = time.time() - (time.monotonic() - started)
    count = sum(1 for file in BUILD.rglob("*.o") if file.stat().st_mtime >= begin)
    return f", {count} files compiled" if count else ""


def check_machine(venv: Path) -> None:
    """Says what is missing before anything is downloaded.

    Raises:
        SystemExit: another Python, no C++ compiler, no headers of Python, or too little space on the disk.
    """
    if sys.version_info[:2] != (3, 11):
        raise SystemExit(
            f"setup: Python 3.11 is needed (this is {sys.version.split()[0]}); set PYTHON=/path/to/python3.11"
        )
    if not shutil.which(os.environ.get("CXX", "g++")):
        raise SystemExit("setup: a C++17 compiler is needed: install g++ 12 or newer, or set CXX to yours")
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        raise SystemExit(f"setup: {headers} has no Python.h: install Python's headers (Debian: python3.11-dev)")
    free = shutil.disk_usage(ROOT).free
    if not venv.exists() and free < NEEDED_BYTES:
        raise SystemExit(f"setup: {NEEDED_BYTES >> 30} GB are needed on the disk of {ROOT}; {free >> 30} GB are free")


def say(message: str) -> None:
    print(f"setup: {message}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--venv", type=Path, default=ROOT / ".venv", help="virtual environment to prepare (default: .venv)"
    )
    parser.add_argument("--bench", action="store_true", help="also install the benchmarks' peers")
    parser.add_argument("--where", metavar="PACKAGE", help="print where PACKAGE is installed, without importing it")
    arguments = parser.parse_args()
    if arguments.where:
        spec = importlib.util.find_spec(arguments.where)
        if spec is None or spec.origin is None:
            raise SystemExit(f"{arguments.where} is not installed in {sys.executable}")
        print(Path(spec.origin).parent)
        return
    check_machine(arguments.venv.absolute())
    try:
        with alone(LOCK):
            prepare(arguments.venv.absolute(), arguments.bench)
    except KeyboardInterrupt:
        raise SystemExit("\nsetup: stopped; finished steps are kept, run `make setup` again") from None


if __name__ == "__main__":
    main()
