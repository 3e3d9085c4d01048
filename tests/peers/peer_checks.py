"""Checks of one peer backend in a process of its own: `python -m tests.peers.peer_checks FILE BACKEND CHECK...`.

The backends install signal and exit handlers and change Dynamo's tables, which must not reach other tests.
FILE receives a JSON object from check to "" or to what went wrong.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
import torch_npu
from torch import Tensor

from npu_compiler.backend import ascend
from npu_compiler.errors import CaptureError
from npu_compiler.runtime import counters
from tests.peers.qwen3_decode import CONFIG, DecodeStep, FusedOps, PlainOps, reference_logits

REPOSITORY = Path(__file__).parents[2]
STEPS = 12
# float32 against float32: only the order of additions differs.
TOLERANCE = {"rtol": 1e-4, "atol": 2e-4}


def some_tokens(batch: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, CONFIG.vocab_size, (batch, STEPS), generator=generator)


def compile_step(ops: PlainOps, batch: int, backend: str, **options: Any) -> Any:
    torch._dynamo.reset()
    step = DecodeStep(ops, batch).eval().requires_grad_(False).npu()
    return torch.compile(step, backend=backend, fullgraph=True, **options)


@torch.inference_mode()
def decode(step: Any, tokens: Tensor) -> dict[str, int]:
    """Runs all steps of `tokens` [batch, steps], compares every step's logits with transformers, and returns what the
    host runtime counted during the last eight steps."""
    expected = reference_logits(tokens)
    before: dict[str, int] = {}
    for index in range(tokens.shape[1]):
        if index == tokens.shape[1] - 8:
            torch.npu.synchronize()
            before = counters.read()
        positions = torch.full((tokens.shape[0],), index).npu()
        torch.compiler.cudagraph_mark_step_begin()
        logits = step(tokens[:, index].npu(), positions)
        torch.testing.assert_close(logits.cpu(), expected[:, index], **TOLERANCE)
    after = counters.read()
    return {name: after[name] - before[name] for name in after}


def assert_replayed(counted: dict[str, int]) -> None:
    assert counted["captures"] == 0, f"recaptured in steady state: {counted}"
    assert counted["graph_launches"] == 8, f"eight decode steps must be eight replays: {counted}"


def check_plain_decode(backend: str) -> None:
    """The step in plain operators: captured once, then one replay a step."""
    before = counters.read()["captures"]
    assert_replayed(decode(compile_step(PlainOps(), 3, backend, dynamic=False), some_tokens(3)))
    assert counters.read()["captures"] > before, "nothing was captured"


def check_fused_decode(backend: str) -> None:
    """The step in torch_npu's fused operators."""
    assert_replayed(decode(compile_step(FusedOps(), 2, backend, dynamic=False), some_tokens(2, seed=2)))


def check_two_batch_sizes(backend: str) -> None:
    """Each size has a graph of its own; going back to the first one captures nothing."""
    torch._dynamo.reset()
    steps = {batch: compile_step(PlainOps(), batch, backend, dynamic=False) for batch in (1, 4)}
    for batch in (1, 4):
        decode(steps[batch], some_tokens(batch, seed=batch))
    before = counters.read()["captures"]
    assert_replayed(decode(steps[1], some_tokens(1, seed=7)))
    assert counters.read()["captures"] == before


def check_force_eager(backend: str) -> None:
    """npugraph_ex without capture: its FX passes only."""
    step = compile_step(FusedOps(), 2, backend, dynamic=False, options={"force_eager": True})
    assert decode(step, some_tokens(2, seed=3))["graph_launches"] == 0


def check_captures_for_ascend(backend: str) -> None:
    """backend="ascend" rewrites the step and hands it over: replayed the same way, in fewer tasks than without."""
    alone = decode(compile_step(PlainOps(), 2, backend, dynamic=False), some_tokens(2, seed=4))
    step = compile_step(PlainOps(), 2, "ascend", dynamic=False, options={"capture_with": backend})
    handed_over = decode(step, some_tokens(2, seed=4))
    assert_replayed(handed_over)
    assert handed_over["graph_nodes"] < alone["graph_nodes"], (handed_over, alone)
    (compiled,) = ascend.compiled()
    assert "captured by npugraph_ex" in str(compiled)


def check_host_scalars_are_not_captured(backend: str) -> None:
    """npugraph_ex replays the first value of a scalar in host memory; such a program is not handed over."""
    others = ascend.compiled()
    run = torch.compile(lambda x, s: x * s + 1, backend="ascend", options={"capture_with": backend})
    x = torch.ones(3).npu()
    with torch.no_grad():
        for number in (1.0, 2.0, 3.0, 4.0):
            assert run(x, torch.tensor(number)).tolist() == [number + 1] * 3
            assert run(x, number).tolist() == [number + 1] * 3
    made = [str(compiled) for compiled in ascend.compiled() if compiled not in others]
    assert len(made) == 2
    for report in made:
        assert "uncaptured: scalar in host memory: s" in report
        assert "captured by npugraph_ex" not in report


def check_copies_to_the_host_are_refused(backend: str) -> None:
    """As without npugraph_ex: before it captures, with the line."""
    run = torch.compile(lambda x: (x + 1).cpu() * 2, backend="ascend", options={"capture_with": backend})
    try:
        run(torch.ones(3).npu())
    except torch._dynamo.exc.BackendCompilerFailed as error:
        assert isinstance(error.inner_exception, CaptureError)
        assert "(x + 1).cpu() * 2" in error.inner_exception.where
    else:
        raise AssertionError("a copy to the host was handed over")


def check_examples_of_the_page(backend: str) -> None:
    """docs/npugraph_ex.md runs as it is printed, and prints what it says."""
    page = (REPOSITORY / "docs/npugraph_ex.md").read_text()
    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(printed):
        file = Path(folder, "example.py")
        file.write_text("\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)))
        exec(compile(file.read_text(), str(file), "exec"), {"__name__": "example"})
    (report,) = re.findall(r"```text\n(.*?)```", page, flags=re.DOTALL)
    for line in (*report.splitlines(), "static_kernel_compile"):
        assert line.removesuffix("...").strip() in printed.getvalue(), (line, printed.getvalue())


def check_unknown_option_is_refused(backend: str) -> None:
    """An option that npugraph_ex lacks is refused before it runs."""
    options = {"capture_with": backend, "npugraph_ex": {"static_kernels": True}}
    try:
        decode(compile_step(PlainOps(), 2, "ascend", dynamic=False, options=options), some_tokens(2))
    except torch._dynamo.exc.BackendCompilerFailed as error:
        assert "known: " in str(error)
        assert "static_kernel_compile" in str(error)
    else:
        raise AssertionError("an unknown option was accepted")


class Attention(torch.nn.Module):
    """Decode attention over a contiguous cache; `lengths` are host integers that a captured graph is given anew."""

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, lengths: list[int]) -> Tensor:
        return torch_npu.npu_fused_infer_attention_score(
            query,
            keys,
            values,
            num_heads=4,
            num_key_value_heads=2,
            input_layout="BSND",
            scale=0.25,
            actual_seq_lengths_kv=lengths,
        )[0]


@torch.inference_mode()
def check_attention_lengths_are_updated(backend: str) -> None:
    """npu_fused_infer_attention_score with other lengths at every step: the graph is updated, not recaptured."""
    torch._dynamo.reset()
    compiled = torch.compile(Attention(), backend=backend, fullgraph=True, dynamic=True)
    generator = torch.Generator().manual_seed(5)
    keys, values = (torch.randn(2, 16, 2, 16, generator=generator).half() for _ in range(2))
    held = keys.npu(), values.npu()
    captures = []
    for index in range(8):
        lengths = [3 + index, 9 + index % 4]
        query = torch.randn(2, 1, 4, 16, generator=generator).half()
        found = compiled(query.npu(), *held, lengths).cpu()
        for row, length in enumerate(lengths):
            q, k, v = (x.float().transpose(0, 1) for x in (query[row], keys[row, :length], values[row, :length]))
            expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.25, enable_gqa=True)
            torch.testing.assert_close(found[row].float(), expected.transpose(0, 1), rtol=2e-3, atol=2e-3)
        captures.append(counters.read()["captures"])
    assert captures[2] == captures[-1], f"recaptured for new lengths: {captures}"
    assert counters.read()["task_group_updates"] > 0


def main() -> None:
    file, backend, names = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    results = {}
    for name in names:
        try:
            globals()[name](backend)
            results[name] = ""
        except Exception:  # noqa: BLE001  every failure is reported by name, whatever it is
            results[name] = traceback.format_exc()
    file.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
