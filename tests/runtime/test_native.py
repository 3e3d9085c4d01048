"""The C interface of libascendcl, tested by a C++ program (tests/runtime/native), with the checking mode off and on.

The same program runs under the thread, address and undefined-behaviour sanitizers with `make test-sanitize`.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).parent / "native"
ROOT = NATIVE.parents[2]


def torch_npu_headers() -> Path:
    spec = importlib.util.find_spec("torch_npu")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "include/third_party/acl/inc"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiles the tests against the libraries that the project uses."""
    libraries = ROOT / "runtime/lib"
    target = tmp_path_factory.mktemp("native") / "runtime_tests"
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", f"-I{ROOT}", "-isystem", str(torch_npu_headers())]
    command += [str(source) for source in sorted(NATIVE.glob("*.cpp"))]
    hidden_in_the_library = ("settings.cpp", "wait.cpp")
    command += [str(ROOT / "runtime/acl" / name) for name in hidden_in_the_library]
    command += ["-o", str(target), str(libraries / "libascendcl.so"), f"-Wl,-rpath,{libraries}", "-lpthread"]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return target


def run(program: Path, settings: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NPU_COMPILER_HOST": settings}
    return subprocess.run([program], capture_output=True, text=True, env=environment, timeout=300)


def test_native(program: Path) -> None:
    result = run(program, "streams=64")
    assert result.returncode == 0, result.stderr
    assert "streams_are_budgeted passed" in result.stdout


def test_native_with_checking(program: Path) -> None:
    result = run(program, "streams=64,check=on,delay_us=50")
    assert result.returncode == 0, result.stderr
    assert "poisons_memory passed" in result.stdout
    assert "aclnnReader on node 3" in result.stderr  # both tasks of a race are named
    assert "aclnnWriter on node 2" in result.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("devics=2", "unknown key 'devics', did you mean 'devices'?"),
        ("devices=0", "devices: '0' is not between 1 and 64"),
        ("hbm=64GB", "hbm: '64GB' is not a size such as 64GiB"),
        ("check=maybe", "check: 'maybe' is not off, on or fatal"),
        ("soc", "'soc' is not of the form key=value"),
    ],
)
def test_settings_are_refused(program: Path, settings: str, message: str) -> None:
    result = run(program, settings)
    assert result.returncode == 1
    assert message in result.stderr
