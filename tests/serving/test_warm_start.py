"""An engine that starts again takes Dynamo's graph and the compiled programs from disk, unless something that decides
them has changed or the files are damaged."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.compilation.caching import aot_compile_hash_factors
from vllm.compilation.counter import compilation_counter
from vllm.engine.arg_utils import EngineArgs

from npu_compiler.backend import FROM_CACHE, STORED
from npu_compiler.errors import WatchWarning
from npu_compiler.serving import compiler
from tests.models import checkpoints
from tests.serving import oracle
from tests.serving.engine import engine, generate, graphs
from tests.serving.test_tokens import ENDING_ONE_BY_ONE, MODES, check_steps

GRAPHS = "torch_compile_cache/torch_aot_compile/*/rank_{}_0/model"
"""Dynamo's graph of a rank, where vLLM keeps it."""
PROGRAMS = "torch_compile_cache/*/rank_{}_0/backbone/*.program"
"""The compiled programs of a rank."""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """vLLM's cache, empty."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # vLLM sets it: put back afterwards
    return tmp_path


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What the compiler gave vLLM: what the cache did for it, and the program."""
    found: list[tuple[str, str]] = []

    def watched(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            made = function(*args, **kwargs)
            program = re.sub(r"watched_\d+_", "watched_", str(made.graph.graph))  # counted through the process
            found.append((made.stored, program))
            return made

        return call

    for name in ("compile_fx", "load_fx"):
        monkeypatch.setattr(compiler, name, watched(getattr(compiler, name)))
    return found


@contextlib.contextmanager
def warnings(logger: logging.Logger) -> Iterator[list[str]]:
    """What a logger of vLLM's is given as warnings meanwhile. Not by a handler: vLLM may set up its log anew, which
    takes them away."""
    found: list[str] = []

    def warning(message: str, *arguments: object, **settings: Any) -> None:
        found.append(message % arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logger, "warning", warning)
        yield found


def start(mode: str, *, traces: bool, **changes: Any) -> tuple[list[list[int]], float]:
    """Greedy tokens of an engine, and the seconds it says that it compiled.

    Args:
        traces: whether Dynamo has to run, or its graph is loaded.
    """
    runs = int(traces)
    with (
        compilation_counter.expect(
            num_aot_compiles=runs, num_aot_artifacts_saved=runs, num_aot_artifacts_loaded=1 - runs
        ),
        engine(checkpoints.cached(checkpoints.Shape()), **(graphs(mode) | changes)) as llm,
    ):
        tokens = generate(llm, oracle.prompts()[:3], 12)
        return tokens, llm.llm_engine.vllm_config.compilation_config.compilation_time


def damage(folder: Path, files: str) -> None:
    """Overwrites the end of every file that `files` matches."""
    found = list(folder.glob(files))
    assert found
    for file in found:
        file.write_bytes(file.read_bytes()[:-1000])


def noted(folder: Path) -> tuple[list[tuple[int, str]], list[float]]:
    """What the option `watch` noted: step and place of each value, and its mean."""
    lines = [json.loads(line) for line in (folder / "notes.jsonl").read_text().splitlines()]
    return [(line["step"], line["place"]) for line in lines], [line["statistics"]["mean"] for line in lines]


def unwatched(program: str) -> str:
    """A program's text without what is noted in it."""
    return re.sub(r" *%watched\w* .*\n|\[num_users=\d+\]", "", program)


def test_starts_after_the_first(cache: Path, compiled: list[tuple[str, str]]) -> None:
    """The second notes what the first does of what the option `watch` names. The third compiles a graph that vLLM has
    stored without the places of its calls, so it can't."""
    mode, folder = "FULL_DECODE_ONLY", checkpoints.cached(checkpoints.Shape())
    watch = {"watch": ["layers.1.mlp:values"], "watch_save": str(cache / "saved"), "watch_print": False}
    watched: dict[str, Any] = {"additional_config": {"compile": watch}}
    expected = [oracle.greedy(folder, prompt, 12) for prompt in oracle.prompts()[:3]]

    tokens, cold = start(mode, traces=True, **watched)
    assert tokens == expected
    ((first, program),) = compiled
    assert first == STORED
    assert "npu_fused.swiglu" in program

    compiled.clear()
    tokens, warm = start(mode, traces=False, **watched)
    assert (tokens, compiled) == (expected, [(FROM_CACHE, program)])
    assert warm < cold

    compiled.clear()
    damage(cache, PROGRAMS.format(0))
    with (
        warnings(compiler.logger) as said,
        pytest.warns(WatchWarning, match="'layers.1.mlp': no call of this program says which module"),
    ):
        tokens, _ = start(mode, traces=False, **watched)
    ((stored, again),) = compiled
    assert (tokens, stored, unwatched(again)) == (expected, STORED, unwatched(program))
    assert any("is compiled again: the stored file is damaged" in message for message in said), said
    places, means = noted(cache / "saved" / "rank0" / "vllm")
    assert len(places) >= 12
    assert noted(cache / "saved" / "rank0" / "vllm.1") == (places, pytest.approx(means, rel=1e-4, abs=1e-6))


@pytest.mark.full
def test_a_damaged_graph_is_traced_again(cache: Path, compiled: list[tuple[str, str]]) -> None:
    mode, folder = "FULL_DECODE_ONLY", checkpoints.cached(checkpoints.Shape())
    expected = [oracle.greedy(folder, prompt, 12) for prompt in oracle.prompts()[:3]]
    start(mode, traces=True)
    ((_, program),) = compiled

    compiled.clear()
    damage(cache, GRAPHS.format(0))
    with warnings(logging.getLogger("vllm.compilation.decorators")) as said:
        tokens, _ = start(mode, traces=True)
    assert (tokens, compiled) == (expected, [(FROM_CACHE, program)])
    assert any("Compiling model again due to a load failure" in message for message in said)


@pytest.mark.full
@pytest.mark.parametrize(
    "changes",
    [
        {"additional_config": {"compile": {"disabled_passes": ["swiglu"]}}},
        {"dtype": "bfloat16"},
        {"max_num_batched_tokens": 128},
    ],
)
def test_another_setting_is_a_cold_start(cache: Path, compiled: list[tuple[str, str]], changes: dict[str, Any]) -> None:
    start("FULL_DECODE_ONLY", traces=True)
    start("FULL_DECODE_ONLY", traces=True, **changes)
    assert [stored for stored, _ in compiled] == [STORED, STORED]


def test_the_compiler_is_part_of_the_key_of_dynamos_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM makes that key before it asks the compiler for its own."""

    def key() -> list[str]:
        config = EngineArgs(model=str(checkpoints.cached(checkpoints.Shape()))).create_engine_config()
        compiler.put_into_key(config)
        return aot_compile_hash_factors(config)

    first = key()
    assert key() == first
    monkeypatch.setattr(compiler, "fingerprint", lambda options: "of another version")
    assert key() != first


@pytest.mark.full
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_mode_starts_again(cache: Path, mode: str, ranks: int) -> None:
    """Tokens and graphs are those of the first start, on every rank, and nothing is compiled or traced again."""
    folder = checkpoints.cached(checkpoints.Shape(family="llama"))
    prompts = oracle.prompts()
    expected = [oracle.greedy(folder, prompt, count) for prompt, count in zip(prompts, ENDING_ONE_BY_ONE, strict=True)]
    three = [oracle.greedy(folder, prompt, 12) for prompt in prompts[:3]]
    written: list[dict[Path, int]] = []
    for _ in range(2):
        with engine(folder, tensor_parallel_size=ranks, distributed_executor_backend="mp", **graphs(mode)) as llm:
            assert generate(llm, prompts, ENDING_ONE_BY_ONE) == expected
            assert generate(llm, prompts[:3], 12) == three
            reports = llm.collective_rpc("report")
        for data in reports:
            check_steps(mode, data)
        files = [file for rank in range(ranks) for kind in (GRAPHS, PROGRAMS) for file in cache.glob(kind.format(rank))]
        written.append({file: file.stat().st_mtime_ns for file in files})
    assert len([file for file in written[0] if file.name == "model"]) == ranks
    assert written[0] == written[1]
