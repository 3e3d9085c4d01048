"""The doctor finds nothing wrong here, names what is wrong elsewhere, and tells no secrets."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from npu_compiler import doctor
from npu_compiler.cli import main
from npu_compiler.doctor import Finding


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("A_TOKEN", "s3cr3t")
        patch.setenv("NPU_COMPILER_CASHE", "s3cr3t too")
        patch.setenv("NPU_COMPILER_CACHE", str(Path.home() / "programs"))
        return doctor.examine()


def topics(findings: list[Finding], state: str) -> set[str]:
    return {finding.topic for finding in findings if finding.state == state}


def test_nothing_is_wrong_here_but_what_the_test_made_up(findings: list[Finding]) -> None:
    assert [finding for finding in findings if finding.state == "error"] == []
    assert {"torch", "CANN", "torch.npu", "devices", "self test", "torch.compile", "compiled programs"} <= topics(
        findings, "ok"
    )
    by_topic = {finding.topic: finding for finding in findings}
    assert "1 capture of " in by_topic["self test"].text and "2 replays" in by_topic["self test"].text
    assert "npugraph_ex" in by_topic["torch.compile"].text
    assert by_topic["NPU_COMPILER_CASHE"].text == "nothing reads it"
    assert 'torch.compile(backend="ascend") works; `vllm serve` works' in by_topic["verdict"].text


def test_the_report_is_markdown_without_secrets_and_home(findings: list[Finding]) -> None:
    text = doctor.as_text(findings)
    assert "s3cr3t" not in text
    assert str(Path.home()) not in text and "~/programs" in text
    title, empty, *lines = text.splitlines()
    assert title.startswith("### ") and not empty
    assert all(line.startswith(("- ok `", "- **note** `", "- **ERROR** `", "  - ")) for line in lines)


def test_an_error_is_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [Finding("torch", "error", "not installed")])
    assert main(["doctor"]) == 1


def test_the_command_prints_it_or_json(
    findings: list[Finding], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.strip() == doctor.as_text(findings)
    assert main(["doctor", "--json"]) == 0
    assert [Finding(**entry) for entry in json.loads(capsys.readouterr().out)] == findings


def test_settings_that_forbid_captures_and_plugins_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "2")
    (wrong,) = [finding for finding in doctor._environment() if finding.state == "error"]
    assert "refuses every capture" in wrong.text and wrong.advice.startswith("unset TASK_QUEUE_ENABLE")
    verdict = next(doctor._verdict([wrong]))
    assert verdict.state == "note" and "`vllm serve` does not work" in verdict.text
    verdict = next(doctor._verdict([Finding("torch.npu", "error", "")]))
    assert verdict.state == "error" and 'backend="ascend") does not work' in verdict.text
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    left_out = [finding for finding in doctor._plugins() if "VLLM_PLUGINS leaves ascend out" in finding.text]
    assert {finding.topic for finding in left_out} == {"vllm.platform_plugins", "vllm.general_plugins"}


def test_the_doctor_knows_every_entry_point() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    groups = {"console_scripts": project["scripts"], **project["entry-points"]}
    known = {
        group: {name: target for name, (target, _) in names.items()} for group, names in doctor.ENTRY_POINTS.items()
    }
    assert known == groups


def test_an_installation_that_is_older_than_its_sources_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = tmp_path / "npu_compiler-0.1.0.dist-info"
    older.mkdir()
    (older / "METADATA").write_text("Metadata-Version: 2.1\nName: npu-compiler\nVersion: 0.1.0\n")
    (older / "entry_points.txt").write_text(
        "[torch_dynamo_backends]\nascend = npu_compiler.backend:compile\n\n"
        "[vllm.platform_plugins]\nascend = npu_compiler.serving:platform_plugin\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))  # of two distributions of one name, the first is the installed one
    found = {finding.topic: finding for finding in doctor._plugins() if finding.state != "ok"}
    assert {topic: finding.state for topic, finding in found.items()} == {
        "console_scripts": "note",
        "torch_dynamo_backends": "error",
        "vllm.general_plugins": "error",
        "vllm.stat_logger_plugins": "note",
    }
    assert all("`make setup`" in finding.advice for finding in found.values())
    assert "npu-compiler is not registered" in found["console_scripts"].text
    assert "python -m npu_compiler.cli" in found["console_scripts"].text
    assert "ascend is registered as npu_compiler.backend:compile, which is" in found["torch_dynamo_backends"].text


def test_commands_are_looked_for_beside_the_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(doctor, "_version", lambda name: "1")
    monkeypatch.setenv("PATH", str(tmp_path))
    ours, theirs = doctor._commands()
    assert (ours.topic, theirs.topic) == ("command npu-compiler", "command vllm")
    assert "python -m npu_compiler.cli" in ours.advice and "install vllm again" in theirs.advice
    for name in ("npu-compiler", "vllm"):
        (tmp_path / name).touch(0o755)
    assert list(doctor._commands()) == [Finding("commands", "ok", f"npu-compiler, vllm in {tmp_path}")]
    monkeypatch.setenv("PATH", "")
    (found,) = doctor._commands()
    assert f"call {tmp_path}/npu-compiler" in found.advice


def test_devices_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor, "_probe", lambda program: [["A", 2**30, 2**31], ["A", 2**30 + 1, 2**31], ["A", 0, 2**31]]
    )
    _, line = doctor._device()
    assert line.text == "2 x A, 1.0 of 2.0 GiB free; 1 x A, 0.0 of 2.0 GiB free"


def test_what_is_missing_says_what_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "")
    found = {finding.topic: finding for finding in doctor._packages()}
    assert found["torch"].state == "error"
    assert found["vllm"].state == "note" and "can't be served" in found["vllm"].text
    assert "Triton kernels" in found["triton"].text


def test_an_installed_cann_names_its_release_and_what_it_lacks(tmp_path: Path) -> None:
    libraries = tmp_path / "lib64"
    libraries.mkdir()
    (libraries / "libascendcl.so").touch()
    (tmp_path / "version.cfg").write_text("# version\nruntime_running_version=[8.5.0:8.5.0.alpha1]\n")
    release, lacks = doctor._installed_cann(libraries)
    assert "8.5.0" in release.text
    assert "libopapi.so" in lacks.text and "libascendcl.so" not in lacks.text


def test_a_probe_that_fails_gives_the_line_that_says_most() -> None:
    assert doctor._probe("raise RuntimeError('no device')") == "RuntimeError: no device"
    assert doctor._probe("print(1); print('[2]')") == [2]
