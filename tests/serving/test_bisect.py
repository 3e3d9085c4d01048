"""A wrong rule in a served model is found from its bundle, by the page docs/bisect_served.md."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

from npu_compiler.errors import BundleError
from npu_compiler.inspect import bundle, collectives
from npu_compiler.inspect.bundle import StoredGraph
from npu_compiler.inspect.contents import Surroundings
from npu_compiler.inspect.outcome import Point
from npu_compiler.inspect.replay import Subject
from npu_compiler.serving.alone import DECODES, Alone, made_up_step, restored
from npu_compiler.serving.attention_notes import LayerNotes
from tests.models import checkpoints
from tests.serving import oracle
from tests.serving.engine import engine, generate, graphs

PAGE = Path(__file__).parents[2] / "docs" / "bisect_served.md"
OF_VLLM = "tp:0"
PROMPTS = ([5, 6, 7, 8, 9], [11] * 20)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The names that the page leaves behind, its answers as token ids, and what it has printed."""
    model = checkpoints.cached(checkpoints.Shape(family="qwen3"))
    file = tmp_path_factory.mktemp("page") / "example.py"
    file.write_text("\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)))
    names: dict[str, Any] = {"__name__": "example", "MODEL": str(model)}
    monkeypatch, lines = pytest.MonkeyPatch(), []
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setattr("builtins.print", lambda *parts, **how: lines.append(" ".join(map(str, parts))))
    try:
        exec(compile(file.read_text(), str(file), "exec"), names)
    finally:
        monkeypatch.undo()
    names["printed"] = "\n".join(lines)
    llm = names.pop("llm")
    names["tokens"] = [list(answer.outputs[0].token_ids) for answer in names["answers"]]
    names["expected"] = [oracle.greedy(model, prompt, 8) for prompt in PROMPTS]
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    yield names
    sys.path.remove(str(names["folder"]))


@pytest.fixture(scope="module")
def graph(page: dict[str, Any]) -> StoredGraph:
    return bundle.open(page["folder"] / "dump").graph()


def test_the_page_finds_the_rule_and_the_match(page: dict[str, Any]) -> None:
    assert page["tokens"] != page["expected"]
    printed = page["printed"]
    for part in (
        r"pass: user_rules\nrule: gate; without it everything is right\n",
        r"\nmatch: slice_\d+, silu, .* became chunk_default, ",
        r"\nat: layers\.[01]\.mlp\.act_fn at .*activation\.py:\d+",
        r"\n  call 0: input KV cache of model\.layers\.1\.self_attn\.attn is off by up to",
        r"test_gate\.py: [1-6] calls of \d+, and user_rules\nwrong",
    ):
        assert re.search(part, printed), printed
    text = page["test"].read_text()
    assert "torch.ops.aten.silu.default(" in text
    assert "torch.ops.vllm" not in text and "npu_compiler.serving" not in text


def test_the_bundle_has_the_step_but_no_weights_and_no_cache(graph: StoredGraph) -> None:
    kept, about = graph.inputs, graph.surroundings
    assert kept is not None and about is not None and about.step is not None
    assert about.step["query_ends"] == [5, 25] and about.step["kv_lengths"] == [5, 20]
    assert about.step["block_table"] == [[0], [1]] and len(set(about.step["slots"])) == 25
    assert set(about.inputs.values()) == {f"model.layers.{index}.self_attn.attn" for index in range(2)}
    memory = {name: len(piece) for name, piece in graph.tensors().items()}
    assert sum(memory.values()) < 300_000, "token ids, positions and the table of rotations"
    assert kept.inputs[0] is not None and len(kept.left_out) >= 9
    assert not graph.memory()


@pytest.mark.parametrize("made_up", [False, True])
def test_attention_of_a_replay_is_what_it_means(graph: StoredGraph, made_up: bool) -> None:
    subject = Subject.of(graph, made_up=made_up)
    outcome = subject.run(Point(disabled=("gate",)))
    assert outcome.right, str(outcome)
    assert not outcome.on_device, "all of the reference is float64"
    caches = [entry for entry in outcome.compared if "KV cache" in entry.what]
    assert len(caches) == 2 * 3 and all(entry.scale > 1 for entry in caches)
    assert all(entry.lowered < 1e-4 * entry.scale for entry in outcome.compared)


def test_what_attention_needs_is_checked_as_it_is_read(graph: StoredGraph) -> None:
    assert graph.surroundings is not None
    broken = graph.surroundings.model_copy(update={"about": {"layers": {"x": {"num_heads": "many"}}}})
    with pytest.raises(ValueError, match="num_heads"):
        restored(broken, {})
    elsewhere = Surroundings(
        module="npu_compiler.serving.alone", inputs=graph.surroundings.inputs, about={"layers": {}}
    )
    alone = restored(elsewhere, {})
    name = next(iter(alone.objects.values()))
    with pytest.raises(BundleError, match=r"reads model\.layers\.0\.self_attn\.attn from the model itself"):
        alone.fit([(torch.ops.vllm.unified_attention_with_output.default, {"layer_name": name})])


@pytest.mark.parametrize("tokens", [1, DECODES, 64])
def test_a_made_up_step_is_one_that_vllm_could_have(tokens: int) -> None:
    step = made_up_step(tokens)
    blocks = [block for row in step.block_table for block in row]
    assert step.query_ends[-1] == step.num_tokens == tokens == len(set(step.slots))
    assert sorted(blocks) == list(range(step.blocks))
    assert all(length >= 1 for length in step.kv_lengths) and max(step.slots) < step.blocks * 128


def along_a_dimension(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.vllm.all_gather(x, -1, 2, OF_VLLM), torch.ops.vllm.reduce_scatter(x, 1, 2, group_name=OF_VLLM)


def test_collectives_of_vllm_run_alone() -> None:
    """As where all ranks have equal values."""
    x = torch.rand(3, 4)
    module = make_fx(along_a_dimension, tracing_mode="fake")(x)
    assert len(collectives.in_order(module.graph)) == 2
    collectives.replace(module, 2)
    assert not collectives.in_order(module.graph)
    gathered, scattered = module(x)
    assert torch.equal(gathered, torch.cat([x, x], 1))
    assert torch.equal(scattered, x[:, :2] * 2)


FORMS = {
    "grouped": {},
    "window": {"window": 9},
    "soft cap": {"soft_cap": 2.0},
    "slopes": {"slopes": [0.5, 0.25, 0.125, 0.0625]},
    "sinks": {"sinks": True},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [3, 20])
def test_every_form_of_attention_is_what_it_means(form: str, tokens: int) -> None:
    """Two layers, the second on the cache of the first: serving's operators against float64."""
    about = LayerNotes(num_heads=4, num_kv_heads=2, head_size=32, scale=0.2, **FORMS[form])
    sharing = LayerNotes(num_heads=4, num_kv_heads=2, head_size=32, scale=0.2, cache_owner="one", **FORMS[form])
    alone = Alone({"a": "one", "b": "two"}, {"one": about, "two": sharing}, None, {})
    operator = torch.ops.vllm.unified_attention_with_output.default
    torch.manual_seed(tokens)
    query, key, value = (torch.randn(tokens, heads, 32) for heads in (4, 2, 2))
    alone.fit((operator, {"query": query, "layer_name": alone.objects[name]}) for name in ("a", "b"))
    found, means = alone.on_device(), alone.in_float64()
    for turn in range(2):
        for name in ("a", "b"):
            output, wide = torch.zeros_like(query).npu(), torch.zeros_like(query).double()
            with found.turn(turn), means.turn(turn):
                operator(query.npu(), key.npu(), value.npu(), output, alone.objects[name])
                means.meanings[operator](query.double(), key.double(), value.double(), wide, alone.objects[name])
            assert torch.allclose(output.cpu().double(), wide, atol=1e-5), (form, turn, name)
            assert found.left().keys() == means.left().keys() == ({"KV cache of one"} if name == "a" else set())
            for what, cache in found.left().items():
                assert torch.equal(cache.double(), means.left()[what])


@pytest.mark.full
def test_pieces_between_attention_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    settings = graphs("PIECEWISE")
    settings["compilation_config"]["debug_dump_path"] = str(tmp_path)
    with engine(checkpoints.cached(checkpoints.Shape(family="qwen3")), **settings) as llm:
        generate(llm, [PROMPTS[1]], 4)
    pieces = bundle.open(tmp_path).graphs
    assert len(pieces) == 3
    for piece in pieces:
        outcome = Subject.of(piece).run(Point())
        assert outcome.right and not outcome.on_device, str(outcome)
        assert all(entry.lowered < 1e-4 * max(entry.scale, 1) for entry in outcome.compared)
