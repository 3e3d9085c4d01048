"""The rule that chooses a CANN, and what a user is told when it cannot be followed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from npu_compiler import doctor
from npu_compiler.runtime import loader


@pytest.fixture
def no_cann(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("NPU_COMPILER_RUNTIME", "ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "LD_LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def make_cann(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "libascendcl.so").touch()
    return folder


def test_host_runtime_without_cann(no_cann: pytest.MonkeyPatch) -> None:
    assert loader.choose() == loader.Choice("host", "no CANN installation found", loader.LIBRARY_FOLDER)


@pytest.mark.parametrize("variable", ["ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"])
def test_installed_cann_is_preferred(no_cann: pytest.MonkeyPatch, tmp_path: Path, variable: str) -> None:
    folder = make_cann(tmp_path / "lib64")
    no_cann.setenv(variable, str(tmp_path))
    assert loader.choose() == loader.Choice("cann", f"libascendcl.so found through ${variable}", folder)


def test_cann_on_the_library_path_is_preferred(no_cann: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = make_cann(tmp_path / "cann")
    no_cann.setenv("LD_LIBRARY_PATH", f"/nonexistent:{folder}")
    assert loader.choose().folder == folder


def test_our_own_folder_on_the_library_path_is_not_a_cann(no_cann: pytest.MonkeyPatch) -> None:
    no_cann.setenv("LD_LIBRARY_PATH", str(loader.LIBRARY_FOLDER))
    assert loader.choose().runtime == "host"


def test_user_can_ask_for_the_host_runtime_beside_a_cann(no_cann: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_cann(tmp_path / "lib64")
    no_cann.setenv("ASCEND_HOME_PATH", str(tmp_path))
    no_cann.setenv("NPU_COMPILER_RUNTIME", "host")
    assert loader.choose().runtime == "host"


def test_asking_for_an_absent_cann_is_refused(no_cann: pytest.MonkeyPatch) -> None:
    no_cann.setenv("NPU_COMPILER_RUNTIME", "cann")
    with pytest.raises(RuntimeError, match=r"no libascendcl\.so lies under.*set_env\.sh"):
        loader.choose()


def test_unknown_runtime_is_refused(no_cann: pytest.MonkeyPatch) -> None:
    for wanted in ("gpu", "cann:/usr"):
        no_cann.setenv("NPU_COMPILER_RUNTIME", wanted)
        with pytest.raises(RuntimeError, match=f"'{wanted}': expected auto, host, host:FOLDER or cann"):
            loader.choose()


def test_another_build_of_the_host_runtime_can_be_named(no_cann: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_cann.setenv("NPU_COMPILER_RUNTIME", f"host:{tmp_path}")
    assert loader.choose().folder == tmp_path
    with pytest.raises(RuntimeError, match=f"missing in {tmp_path}"):
        loader.load()


def test_half_built_runtime_is_named(no_cann: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "libascendcl.so").touch()
    no_cann.setattr(loader, "LIBRARY_FOLDER", tmp_path)
    with pytest.raises(RuntimeError, match=r"not complete: .*libhccl\.so.* missing.*make setup"):
        loader.load()


def test_another_torch_npu_is_refused(no_cann: pytest.MonkeyPatch) -> None:
    no_cann.setattr(loader, "TORCH_NPU", "2.14.0")
    with pytest.raises(RuntimeError, match=r"torch_npu 2\.13\.0 is installed.*pip install torch_npu==2\.14\.0"):
        loader.load()


def in_fresh_interpreter(code: str, **given: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` with no variable set that could point at a CANN, or that the loader sets."""
    hidden = ("NPU_COMPILER_RUNTIME", "ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "LD_LIBRARY_PATH", loader.LAUNCH_QUEUE)
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | given
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


def test_import_torch_brings_up_npu_with_nothing_set_by_hand() -> None:
    code = "import torch; print(torch.npu.is_available(), (torch.ones(2, device='npu') + 1).tolist())"
    result = in_fresh_interpreter(code)
    assert result.stdout.splitlines()[-1:] == ["True [2.0, 2.0]"], result.stderr


def test_import_torch_npu_first_works_too() -> None:
    result = in_fresh_interpreter("import torch_npu, torch; print(torch.npu.device_count() > 0)")
    assert result.stdout.splitlines()[-1:] == ["True"], result.stderr


def test_looking_for_torch_npu_loads_nothing() -> None:
    code = "import importlib.util, sys; importlib.util.find_spec('torch_npu'); print('torch' in sys.modules)"
    result = in_fresh_interpreter(code)
    assert result.stdout.splitlines()[-1:] == ["False"], result.stderr


def test_interpreters_without_torch_do_not_pay_for_the_hook() -> None:
    result = in_fresh_interpreter("import sys; print('torch' in sys.modules, 'ctypes' in sys.modules)")
    assert result.stdout.strip() == "False False", result.stderr


@pytest.mark.parametrize(("given", "queued"), [({}, "False"), ({loader.LAUNCH_QUEUE: "1"}, "True")])
def test_launches_take_no_way_through_the_queue_unless_asked_for(given: dict[str, str], queued: str) -> None:
    """torch_npu names the threads of its queue; without the queue there are none."""
    code = """
import glob, time, torch
x = torch.ones(2, device="npu") + 1
end, queued = time.time() + 2, False
while not queued and time.time() < end:
    queued = any(open(name).read() == "release_thread\\n" for name in glob.glob("/proc/self/task/*/comm"))
print(x.tolist(), queued)
"""
    result = in_fresh_interpreter(code, **given)
    assert result.stdout.splitlines()[-1:] == [f"[2.0, 2.0] {queued}"], result.stderr


def test_doctor_reports_another_torch_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PINNED", {"torch_npu": "2.12.0"})
    findings = list(doctor._packages())
    assert findings[0].state == "error"
    assert "install torch_npu==2.12.0" in findings[0].advice
