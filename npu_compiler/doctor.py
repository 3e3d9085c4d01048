"""What is installed, which CANN is used and why, what works and what does not: the facts behind `npu-compiler doctor`.

Each check is a function that returns findings and lets none of the others down: the doctor must work where torch
cannot be imported. Of the environment it tells the variables below and no others; paths below the home folder, the
interpreter's and this project's begin with what stands for them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npu_compiler import __version__
from npu_compiler.runtime import loader

PINNED = {"torch": "2.13.0", "torch_npu": loader.TORCH_NPU, "vllm": "0.32.0"}
OPTIONAL = {"vllm": "vLLM can't be served; torch.compile works without it"}
BESIDE = {
    "triton": "Triton kernels of a user's own can't be compiled; the project's operators don't need it",
    "transformers": "models of transformers can't be loaded",
    "depyf": "vLLM's debug_dump_path, which calls it, fails",
    "numpy": "numpy() of a tensor fails",
    "pydantic": "bundles can be neither written nor read",
    "safetensors": "bundles can be neither written nor read",
}
"""Packages of any version, and what goes without them."""
OWN_VARIABLES = {
    "NPU_COMPILER_RUNTIME": "which CANN",
    "NPU_COMPILER_HOST": "the host runtime's devices",
    "NPU_COMPILER_HOST_ISA": "instructions the host runtime may use",
    "NPU_COMPILER_HCCL_CONNECT_SECONDS": "how long a rank waits for the others",
    "NPU_COMPILER_CACHE": "folder of compiled programs",
    "NPU_COMPILER_DUMP": "folder for bundles",
    "NPU_COMPILER_PRINT_PIPELINE": "print each compilation",
    "NPU_COMPILER_BUILD_TYPE": "how the host runtime is built",
}
VARIABLES = (
    *("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "ASCEND_RT_VISIBLE_DEVICES", "ASCEND_LAUNCH_BLOCKING"),
    *("TASK_QUEUE_ENABLE", "PYTORCH_NPU_ALLOC_CONF", "HCCL_BUFFSIZE", "LD_LIBRARY_PATH", "OMP_NUM_THREADS"),
    *("TORCH_DEVICE_BACKEND_AUTOLOAD", "TORCH_LOGS", "TORCH_TRACE", "TORCHDYNAMO_DISABLE"),
    *("VLLM_PLUGINS", "VLLM_USE_V2_MODEL_RUNNER", "VLLM_WORKER_MULTIPROC_METHOD", "VLLM_LOGGING_LEVEL"),
)
"""Variables of others that change what happens here; none holds a secret."""
UNCAPTURABLE = {"TASK_QUEUE_ENABLE": "2", "ASCEND_LAUNCH_BLOCKING": "1"}
"""Settings under which torch_npu refuses every capture."""
METRICS, COMMAND = "vllm.stat_logger_plugins", "console_scripts"
ENTRY_POINTS = {
    COMMAND: {"npu-compiler": ("npu_compiler.cli:main", "the command `npu-compiler`")},
    "torch_dynamo_backends": {"ascend": ("npu_compiler.backend:ascend", 'torch.compile(backend="ascend")')},
    "vllm.platform_plugins": {"ascend": ("npu_compiler.serving:platform_plugin", "vLLM's device `npu`")},
    "vllm.general_plugins": {"ascend": ("npu_compiler.serving:general_plugin", "vLLM's attention on npu")},
    METRICS: {
        "ascend_metrics": (
            "npu_compiler.serving.metrics:StepMetrics",
            "replayed and eager steps in vLLM's metrics and log",
        )
    },
}
"""What an installation registers: group, name, what it stands for, what it is good for. Python reads them from the
installed metadata, which stays as it is when the sources of an editable installation get another one."""
INSTEAD = {
    "npu-compiler": "python -m npu_compiler.cli",
    "vllm": "python -m vllm.entrypoints.cli.main",
}
"""Commands, and what does the same where one is missing."""
OLD = "install npu-compiler again (`make setup`): what is installed is older than its sources"
# Each runs in a process of its own: a broken torch_npu must not end the doctor. The last line is JSON.
DEVICE_PROBE = """
import json, torch
torch.npu.init()  # is_available() would only say no
x = torch.arange(4, device="npu") + 1
assert x.cpu().tolist() == [1, 2, 3, 4], x.cpu().tolist()
devices = []
for index in range(torch.npu.device_count()):
    torch.npu.set_device(index)
    devices.append([torch.npu.get_device_name(index), *torch.npu.mem_get_info()])
print(json.dumps(devices))
"""
CAPTURE_PROBE = """
import json, time, torch
from npu_compiler.backend import AscendBackend

def block(x, weight, gate_up):
    h = weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
    gate, up = (h @ gate_up).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up

start, backend = time.perf_counter(), AscendBackend()
arguments = [torch.rand(*shape) for shape in ((4, 64), (64,), (64, 256))]
with torch.inference_mode():
    run = torch.compile(block, backend=backend)
    found = [run(*(argument.npu() for argument in arguments)) for _ in range(3)][-1].cpu()
    expected = block(*(argument.double() for argument in arguments))
(compiled,) = backend.compiled()
known = set(torch._dynamo.list_backends(exclude_tags=()))
print(json.dumps({
    "error": (found - expected).abs().max().item(), "largest": expected.abs().max().item(),
    "captures": len(compiled.ledger.captures), "replays": compiled.ledger.replays,
    "calls": compiled.ledger.captures[0].calls if compiled.ledger.captures else 0,
    "uncaptured": list(compiled.ledger.uncaptured), "seconds": time.perf_counter() - start,
    "backends": sorted(known & {"ascend", "npugraphs", "npugraph_ex", "npu", "inductor"}),
}))
"""
TOLERANCE = 1e-4
"""Of the self test's largest value: float32 against float64."""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report. `state` is "ok", "note" or "error"; `advice` says what to do next."""

    topic: str
    state: str
    text: str
    advice: str = ""


def examine() -> list[Finding]:
    """Runs every check; takes some ten seconds, most of it imports of torch in two subprocesses."""
    checks = (
        _machine,
        _packages,
        _runtime,
        _start_up_hook,
        _environment,
        _plugins,
        _commands,
        _cache,
        _device,
        _capture,
    )
    found = [finding for check in checks for finding in check()]
    return [_without_private_paths(finding) for finding in (*found, *_verdict(found))]


def as_text(findings: list[Finding]) -> str:
    """The report as Markdown, to paste into a bug report."""
    mark = {"ok": "ok", "note": "**note**", "error": "**ERROR**"}
    lines = ["### npu-compiler doctor", ""]
    for finding in findings:
        lines.append(f"- {mark[finding.state]} `{finding.topic}`: {finding.text}")
        if finding.advice:
            lines.append(f"  - {finding.advice}")
    return "\n".join(lines)


def _machine() -> Iterator[Finding]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    text = (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {memory:.0f} GiB, "
        f"Python {platform.python_version()}"
    )
    if sys.version_info[:2] == (3, 11):
        yield Finding("machine", "ok", text)
    else:
        yield Finding("machine", "error", text, "npu-compiler is built and tested with Python 3.11 only")


def _packages() -> Iterator[Finding]:
    for name, wanted in PINNED.items():
        version = _version(name)
        if not version:
            state, lost = ("note", f": {OPTIONAL[name]}") if name in OPTIONAL else ("error", "")
            yield Finding(name, state, f"not installed{lost}", f"install {name} {wanted} (`make setup` does)")
        elif version.split("+")[0] == wanted:
            yield Finding(name, "ok", version)
        else:
            yield Finding(name, "error", f"{version}, but {wanted} is needed", f"install {name}=={wanted}")
    yield Finding("npu-compiler", "ok", __version__)
    versions = {name: _version(name) for name in BESIDE}
    yield Finding("beside", "ok", ", ".join(f"{name} {version}" for name, version in versions.items() if version))
    for name, lost in BESIDE.items():
        if not versions[name]:
            yield Finding(name, "note", f"not installed: {lost}", f"pip install {name}, if you want it")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


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
        missing = loader.missing_libraries(choice.folder)
        if missing:
            yield Finding("host runtime", "error", f"not built: {', '.join(missing)}", "run `make setup`")
        else:
            yield Finding("host runtime", "ok", f"all {len(loader.LIBRARIES)} libraries are there")
    else:
        yield from _installed_cann(choice.folder)
    shadow = _torch_npu_libs()
    if shadow:
        yield Finding(
            "torch_npu.libs",
            "note",
            f"{shadow} holds CANN libraries; torch_npu's DT_RPATH searches it before LD_LIBRARY_PATH",
            "nothing of npu-compiler's lies there; remove it unless you put it there on purpose",
        )


def _installed_cann(folder: Path) -> Iterator[Finding]:
    """The release that an installed CANN names, and which of the libraries it lacks."""
    for file in (folder.parent / "version.cfg", folder.parent.parent / "version.cfg", folder.parent / "version.info"):
        if file.is_file():
            found = re.search(r"[Vv]ersion\w*=\[?(?:[^\]\n]*:)?([\w.]+)", file.read_text(errors="replace"))
            yield Finding("CANN release", "ok", found[1] if found else f"not named in {file}")
            break
    missing = loader.missing_libraries(folder)
    if missing:
        yield Finding(
            "CANN libraries", "note", f"not in {folder}: {', '.join(missing)}", "install CANN's toolkit and kernels"
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


def _environment() -> Iterator[Finding]:
    names = [name for name in (*OWN_VARIABLES, *VARIABLES) if name in os.environ]
    text = ", ".join(f"{name}={os.environ[name]}" for name in names)
    yield Finding("environment", "ok", text or "no variable that matters is set")
    for name, value in UNCAPTURABLE.items():
        if os.environ.get(name) == value:
            yield Finding(
                name, "error", f"{name}={value}: torch_npu refuses every capture", f"unset {name}, or capture nothing"
            )
    for name in sorted(os.environ):
        if name.startswith("NPU_COMPILER_") and name not in OWN_VARIABLES:
            yield Finding(name, "note", "nothing reads it", f"known: {', '.join(OWN_VARIABLES)}")


def _plugins() -> Iterator[Finding]:
    for group, wanted in ENTRY_POINTS.items():
        if group.startswith("vllm") and not _version("vllm"):
            continue
        found = importlib.metadata.entry_points(group=group)
        for name, (target, purpose) in wanted.items():
            ours = [entry.value for entry in found if entry.name == name and entry.value.startswith("npu_compiler")]
            state = "note" if group in (METRICS, COMMAND) else "error"
            instead = "; `python -m npu_compiler.cli` is the same" if group == COMMAND else ""
            if not ours:
                yield Finding(group, state, f"{name} is not registered: no {purpose}{instead}", OLD)
            elif target not in ours:
                text = f"{name} is registered as {ours[0]}, which is {target} now: no {purpose}{instead}"
                yield Finding(group, state, text, OLD)
            elif group.startswith("vllm") and not _allowed(name):
                yield Finding(group, "note", f"VLLM_PLUGINS leaves {name} out: no {purpose}", f"add {name} to it")
            else:
                yield Finding(group, "ok", f"{name}: {purpose}")
        if group == "vllm.platform_plugins":
            others = [f"{entry.name} ({entry.value})" for entry in found if not entry.value.startswith("npu_compiler")]
            if others:
                advice = "uninstall the other one, or choose by VLLM_PLUGINS where the names differ"
                yield Finding(group, "note", f"also installed: {', '.join(others)}; vLLM takes one platform", advice)


def _commands() -> Iterator[Finding]:
    """The commands beside this interpreter, and whether a shell finds them without their folder."""
    folder = Path(sys.executable).parent
    there = [name for name in INSTEAD if os.access(folder / name, os.X_OK)]
    for name, same in INSTEAD.items():
        if name not in there and _version(name):
            advice = f"install {name} again, in this environment; `{same}` is the same"
            yield Finding(f"command {name}", "note", f"not in {folder}", advice)
    if there:
        found = all(shutil.which(name) == str(folder / name) for name in there)
        advice = "" if found else f"PATH does not lead there: call {folder}/{there[0]}, or activate the environment"
        yield Finding("commands", "ok", f"{', '.join(there)} in {folder}", advice)


def _allowed(plugin: str) -> bool:
    """Whether vLLM loads a plugin of this name."""
    given = os.environ.get("VLLM_PLUGINS")
    return given is None or plugin in given.split(",")


def _cache() -> Iterator[Finding]:
    for topic, place in (("compiled programs", _program_cache()), ("vLLM's compile cache", _vllm_cache())):
        if not place.is_dir():
            yield Finding(topic, "ok", f"none yet; they go to {place}")
            continue
        files = [file for file in place.rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in files) / 2**20
        yield Finding(topic, "ok", f"{len(files)} files, {size:.1f} MiB in {place}")
        if not os.access(place, os.W_OK):
            yield Finding(topic, "error", f"{place} can't be written", "name another folder, or change its owner")


def _program_cache() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("NPU_COMPILER_CACHE") or base / "npu_compiler")


def _vllm_cache() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("VLLM_CACHE_ROOT") or base / "vllm") / "torch_compile_cache"


def _device() -> Iterator[Finding]:
    devices = _probe(DEVICE_PROBE)
    if isinstance(devices, str):
        yield Finding("torch.npu", "error", devices, "the full message: python -c 'import torch; torch.npu.init()'")
        return
    yield Finding("torch.npu", "ok", f"{len(devices)} devices; an addition ran on the first")
    counted = Counter(f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free" for name, free, total in devices)
    yield Finding("devices", "ok", "; ".join(f"{count} x {text}" for text, count in counted.items()))


def _capture() -> Iterator[Finding]:
    found = _probe(CAPTURE_PROBE)
    if isinstance(found, str):
        yield Finding(
            "self test", "error", found, 'no function can be compiled by backend="ascend"; see the lines above'
        )
        return
    backends = ", ".join(found["backends"])
    yield Finding("torch.compile", "ok" if "ascend" in backends else "error", f"backends that are there: {backends}")
    text = (
        f"a norm and a gated product: {found['captures']} capture of {found['calls']} calls, {found['replays']} replays"
    )
    error = found["error"] / found["largest"]
    text += f", relative error {error:.1e}, {found['seconds']:.1f} s"
    if error > TOLERANCE:
        yield Finding("self test", "error", text, f"a result is wrong by more than {TOLERANCE}; report it")
    elif found["replays"] != 2 or found["captures"] != 1:
        yield Finding("self test", "error", text, f"1 capture and 2 replays were expected: {found['uncaptured']}")
    else:
        yield Finding("self test", "ok", text)


def _probe(program: str) -> Any:
    """What a program prints as JSON; the line of its error that says most, as text."""
    try:
        ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return "nothing came back within 120 s"
    if ran.returncode == 0:
        return json.loads(ran.stdout.strip().splitlines()[-1])
    lines = ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"]
    own = [line for line in lines if line.startswith("[host runtime]")]
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
    return (own or errors or lines)[-1]


def _verdict(found: list[Finding]) -> Iterator[Finding]:
    """What works and what does not, from what was found."""
    wrong = {finding.topic for finding in found if finding.state == "error"}
    compiles = "self test" not in wrong and "torch.npu" not in wrong
    serves = compiles and bool(_version("vllm")) and not wrong & {"vllm", "vllm.platform_plugins", *UNCAPTURABLE}
    text = f'torch.compile(backend="ascend") {_works(compiles)}; `vllm serve` {_works(serves)}'
    yield Finding("verdict", "ok" if serves else "note" if compiles else "error", text)
    if any(finding.topic == "host runtime" for finding in found):
        yield Finding("speed", "note", "the devices are simulated on this CPU: its times say nothing about a card")


def _works(works: bool) -> str:
    return "works" if works else "does not work"


def _without_private_paths(finding: Finding) -> Finding:
    """Puts what stands for them in the place of folders that say who or where somebody is."""
    folders = {sys.prefix: "ENV", str(Path(loader.__file__).parents[1]): "NPU_COMPILER", str(Path.home()): "~"}
    text, advice = finding.text, finding.advice
    for folder, name in folders.items():
        if len(folder) > 1:
            text, advice = text.replace(folder, name), advice.replace(folder, name)
    return Finding(finding.topic, finding.state, text, advice)
