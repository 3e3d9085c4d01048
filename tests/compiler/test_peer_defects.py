"""Defects of other graph compilers for this kind of device, each with a test that ours does not have it.

Sources are named by project and issue; npugraph_ex is the one in the wheel of torch_npu 2.13.0. docs/peers.md lists
them all, with those that can't apply here, and those that are tested elsewhere.
"""

from __future__ import annotations

import dataclasses
import gc
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from npu_compiler.backend import fingerprint
from npu_compiler.config import BY_ROWS, DECIDE_NOTHING, WEIGHT_NZ, Options
from npu_compiler.errors import OptionError, StaleOutputError
from npu_compiler.passes import pipeline
from tests.compiler.test_capture import Compiled, assert_same, check, rows

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def operators() -> Iterator[None]:
    """`write_two(a!, b!, x)` zeroes before it reads, so that an alias of what it writes and reads shows."""
    with torch.library._scoped_library("peer_defects", "DEF") as library:
        library.define("write_two(Tensor(a!) one, Tensor(b!) other, Tensor x) -> ()")
        library.define("fails(Tensor x) -> Tensor")
        library.define("stack_into(Tensor(a!) out, Tensor[] parts) -> ()")

        def write_two(one: Tensor, other: Tensor, x: Tensor) -> None:
            one.zero_()
            other.zero_()
            one.add_(x)
            other.sub_(x)

        def fails(x: Tensor) -> Tensor:
            raise Unusual("code 7", 7)

        def stack_into(out: Tensor, parts: list[Tensor]) -> None:
            out.zero_()
            out.add_(torch.stack(parts))

        library.impl("stack_into", stack_into, "CompositeExplicitAutograd")
        library.impl("stack_into", lambda out, parts: None, "Meta")
        library.impl("write_two", write_two, "CompositeExplicitAutograd")
        library.impl("write_two", lambda one, other, x: None, "Meta")
        library.impl("fails", fails, "CompositeExplicitAutograd")
        library.impl("fails", torch.empty_like, "Meta")
        yield


class Unusual(Exception):
    """An exception whose constructor takes more than a message."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def test_weight_quantised_product() -> None:
    """npugraph_ex: npu_weight_quant_batchmatmul in a graph reads a field of its configuration that does not exist."""
    weight = torch.randint(-8, 8, (16, 8), dtype=torch.int8)
    scale = torch.rand(8, dtype=torch.float16)

    def product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return torch.ops.npu.npu_weight_quant_batchmatmul(x, weight, scale) + 1

    compiled = Compiled(product, dynamic=False)
    for _ in range(3):
        x = torch.rand(4, 16).half()
        expected = x.double() @ (weight.double() * scale.double()) + 1
        got = compiled(x.npu(), weight.npu(), scale.npu())
        torch.testing.assert_close(got.cpu().double(), expected, rtol=5e-3, atol=5e-2)
    assert compiled.ledger.replays == 2


def test_sizes_of_two_graphs_do_not_meet() -> None:
    """npugraph_ex: sizes become names in a module's globals and are evaluated from text, so graphs see each other's."""
    first = Compiled(lambda x: torch.zeros(x.shape[0] * 2 + 1, device=x.device) + x.sum(), dynamic=True)
    second = Compiled(lambda x: x.new_ones(x.shape[0] // 2, 3) * x.shape[0], dynamic=True)
    for size in (4, 6, 10, 4):
        x = torch.rand(size, 2).npu()
        assert first(x).shape == (size * 2 + 1,)
        assert second(torch.rand(size + 2, 2).npu()).cpu().eq(size + 2).all()
        assert second(torch.rand(size + 2, 2).npu()).shape == (size // 2 + 1, 3)


def test_names_that_look_like_code() -> None:
    """npugraph_ex splices lines into generated code wherever a substring matches; pytorch 137229: an argument named
    `out` keeps a pattern from matching."""

    def swiglu(out: Tensor, stream: Tensor, forward: Tensor, replay_return: Tensor) -> Tensor:
        copy_ = torch.nn.functional.silu(out) * stream
        return copy_ + forward - replay_return

    compiled = check(swiglu, [tuple(torch.rand(2, 8) for _ in range(4)) for _ in range(3)], dynamic=False)
    (graph,) = compiled.backend.compiled()
    assert any(record.name == "swiglu" and record.fired for record in graph.records)


def test_options_have_their_types() -> None:
    """npugraph_ex: a number option comes back as a string."""
    assert Options.of({"capture_limit": 8}).capture_limit == 8
    with pytest.raises(OptionError, match="capture_limit is int"):
        Options.of({"capture_limit": "8"})


def test_import_leaves_signals_and_exit_alone() -> None:
    """npugraph_ex: importing it takes SIGTERM and SIGINT, and resets dynamo at exit."""
    code = """
import atexit, signal, torch, torch_npu
watched = [signal.SIGTERM, signal.SIGINT]
before, handlers = [signal.getsignal(each) for each in watched], atexit._ncallbacks()
import npu_compiler.backend, npu_compiler.passes.pipeline, npu_compiler.aclgraph.replay
print([signal.getsignal(each) for each in watched] == before, atexit._ncallbacks() - handlers)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours = result.stdout.strip().splitlines()[-1]
    assert ours.startswith("True"), "signal handlers changed"
    assert int(ours.split()[1]) <= torch_handlers(), "exit handlers of our own"


def torch_handlers() -> int:
    """How many exit handlers the modules of torch register that we import: none of them is ours."""
    code = """
import atexit, torch, torch_npu
before = atexit._ncallbacks()
import torch._functorch.aot_autograd
import torch._dynamo.backends.registry
print(atexit._ncallbacks() - before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(result.stdout.strip().splitlines()[-1])


def test_exceptions_stay_themselves() -> None:
    """npugraph_ex raises `type(error)(text)` anew, which fails for exceptions with other constructors."""
    compiled = Compiled(lambda x: torch.ops.peer_defects.fails(x) * 2, dynamic=False)
    with pytest.raises(Unusual) as caught:
        compiled(torch.rand(2).npu())
    assert caught.value.code == 7


def test_repeated_argument_of_an_operator_that_writes_two() -> None:
    """npugraph_ex skips the check of repeated arguments for operators with several writes; pytorch 198031:
    `op(clone(x), x)` became `op(x, x)`."""

    def step(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = x * 2
        one, other = y.clone(), y.clone()
        torch.ops.peer_defects.write_two(one, other, y)
        return one, other, y + 0

    check(step, [(torch.rand(4),) for _ in range(3)], dynamic=False)

    def into_inputs(one: Tensor, other: Tensor) -> Tensor:
        torch.ops.peer_defects.write_two(one, other, one.clone())
        return one - other

    check(into_inputs, [(torch.rand(4), torch.rand(4)) for _ in range(4)], dynamic=False)


def test_two_new_tensors_that_an_operator_writes_stay_two() -> None:
    """pytorch 132196: two equal allocations, both written by one operator, became one."""

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        one, other = torch.zeros_like(x), torch.zeros_like(x)
        torch.ops.peer_defects.write_two(one, other, x)
        return one, other

    check(step, [(torch.rand(4),) for _ in range(3)], dynamic=False)


def test_memory_of_what_was_updated_in_place_is_not_reused() -> None:
    """pytorch 183575: a moment updated in place and then only read passed for written by its reader, and a cast
    further on got its memory."""

    def optimizer_step(p: Tensor, q: Tensor, x: Tensor, m: Tensor, n: Tensor) -> Tensor:
        y = x.half() @ p.half()
        gradient_q = (y.t() @ x.half()).float()
        gradient_p = (x.half().t() @ (y @ q.half())).float()
        m.lerp_(gradient_p, 0.05)
        p.add_(m, alpha=-0.01)
        n.lerp_(gradient_q, 0.05)
        q.add_(n, alpha=-0.01)
        return y.float().sum()

    check(optimizer_step, [tuple(torch.rand(8, 8) for _ in range(5)) for _ in range(4)], dynamic=False)


def rows_move_up(x: Tensor) -> Tensor:
    x[1:] = x[:-1].clone()
    return x * 2


def columns_move_left(x: Tensor) -> Tensor:
    x[:, :-1].copy_(x[:, 1:].clone())
    return x.sum(0)


def rows_change_places(x: Tensor) -> Tensor:
    x[[0, 2]] = x[[2, 0]]
    return x + 1


def transposed_in_place(x: Tensor) -> Tensor:
    x.copy_(x.t().clone())
    return x + 1


def scattered_and_zeroed(x: Tensor) -> Tensor:
    y = torch.slice_scatter(x, x[:2] * 3, 0, 1, 3)
    x.zero_()
    return y


def copied_between_two_writes(x: Tensor) -> Tensor:
    x[1] = 5
    y = x.clone()
    x.clamp_(max=0.5)
    return y


def read_before_a_write(x: Tensor) -> Tensor:
    y = x.view(torch.int32) * 2
    y.sub_(-4)
    x[:, 2:] = 2
    return y.view(torch.float32)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "step",
    [
        rows_move_up,
        columns_move_left,
        rows_change_places,
        transposed_in_place,
        scattered_and_zeroed,
        copied_between_two_writes,
        read_before_a_write,
    ],
)
def test_writes_of_what_the_same_memory_holds(step: Callable[[Tensor], Tensor], dynamic: bool) -> None:
    """pytorch 197829: the clone in `x[1:] = x[:-1].clone()` was dropped, and a copy overlapped itself. 198094: a
    scatter was written into an input that something else overwrote. 198101: an input was read after its write."""
    check(step, [(torch.rand(4, 4),) for _ in range(3)], dynamic=dynamic)


def test_what_an_operator_wrote_is_what_is_read() -> None:
    """pytorch 127821: behind an operator that writes a constant's memory, the constant was read."""

    def step(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.full((2, 4), 1.0, device=x.device)
        torch.ops.peer_defects.stack_into(out, [x, y])
        return (out * out).sum(), out

    check(step, [(torch.rand(4), torch.rand(4)) for _ in range(3)], dynamic=False)


def test_strides_are_looked_at_in_every_call() -> None:
    """npugraph_ex asserts sizes and strides in the first call only."""
    square = torch.rand(4, 4)
    check(lambda x: x.reshape(-1) * 2, [(square,), (square,), (square.t(),), (square,), (square.t(),)], dynamic=False)


def test_recapture_at_the_limit_keeps_the_other_graphs() -> None:
    """npugraph_ex: at capture_limit, capturing a known shape anew (its cache moved) drops all graphs and goes eager."""

    def step(x: Tensor, cache: Tensor) -> Tensor:
        doubled = x * 2  # first, so that the rows are the first size of the key
        return doubled * cache.add_(1).sum()

    compiled = Compiled(step, dynamic=True, options={"capture_limit": 2})
    caches = [torch.zeros(4).npu() for _ in range(2)]
    for cache, size in ((0, 2), (0, 3), (0, 2), (0, 3), (1, 2), (1, 2), (0, 3), (0, 3)):
        x = torch.rand(size, 7)
        before = caches[cache].cpu() + 1
        assert_same(compiled(x.npu(), caches[cache]), x * 2 * before.sum())
    assert [rows(entry.key) for entry in compiled.ledger.captures] == ["2", "3", "2"]
    assert not compiled.ledger.evicted
    assert compiled.ledger.replays == 5


def test_sixty_fifth_shape() -> None:
    """npugraph_ex: one shape more than capture_limit (64) and every graph is dropped, for ever; pytorch 188150: a graph
    for every shape, without end. Here the one least recently used goes, and the others stay."""
    compiled = Compiled(lambda x: x + x.shape[0], dynamic=True)
    sizes = [*range(2, 67), *range(3, 67)]
    for size in sizes:
        assert compiled(torch.zeros(size, 1).npu()).cpu().eq(size).all()
    assert len(compiled.ledger.captures) == 65
    assert [rows(key) for key in compiled.ledger.evicted] == ["2"]
    assert compiled.ledger.replays == 64


def test_uncloned_outputs_of_one_shape_are_refused_when_stale() -> None:
    """npugraph_ex with clone_output=False and one captured shape returns the same tensors in every call, silently;
    pytorch 148439, 170604, 158551: outputs of a captured graph change behind the caller's back."""
    kept = Compiled(lambda x: x + 1, dynamic=False)
    results = [kept(torch.full((4,), float(call)).npu()) for call in range(4)]
    assert [result.cpu()[0].item() for result in results] == [1.0, 2.0, 3.0, 4.0]
    own = Compiled(lambda x: x + 1, dynamic=False, options={"clone_outputs": False})
    own(torch.ones(4).npu())
    held = own(torch.ones(4).npu())
    with pytest.raises(StaleOutputError):
        own(torch.zeros(4).npu())
    assert held.cpu().eq(2).all()


def test_advice_on_stale_outputs_helps() -> None:
    """pytorch 177192: the error on overwritten outputs advised what overwrites them."""
    own = Compiled(lambda x: x + 1, dynamic=False, options={"clone_outputs": False})
    own(torch.ones(4).npu())
    held = own(torch.ones(4).npu())
    with pytest.raises(StaleOutputError) as caught:
        own(torch.zeros(4).npu())
    advice = str(caught.value)
    assert "clone" in advice
    cloned = held.clone()
    del held
    assert own(torch.zeros(4).npu()).cpu().eq(1).all()
    assert cloned.cpu().eq(2).all()
    assert "clone_outputs" in advice


def test_output_of_a_call_is_the_input_of_the_next() -> None:
    """pytorch 152887: `f(f(x))` failed at the second call of the first use."""
    compiled = Compiled(lambda x: x + 1, dynamic=False)
    x = torch.ones(2).npu()
    assert compiled(compiled(x)).cpu().eq(3).all()
    for _ in range(4):
        x = compiled(x)
    assert x.cpu().eq(5).all()


def test_every_option_is_part_of_the_cache_key() -> None:
    """torchair: custom passes count by the text of their byte code, or by a constant; a pass switch that is not in the
    key serves a graph compiled with the other setting."""
    plain = fingerprint()
    decide_nothing = {
        **{"dump": "/elsewhere", "dump_inputs": "all", "check": True, "cache": True, "print_pipeline": True},
        **{"watch_print": False, "watch_save": "/elsewhere", "watch_keep": 3},
    }
    assert decide_nothing.keys() == DECIDE_NOTHING
    for name, value in decide_nothing.items():
        assert fingerprint({name: value}) == plain, name
    all_on = {"matmul_all_reduce": 1}  # a pass that does not run cannot be switched off
    # which exclude others
    apart = {**dict.fromkeys(BY_ROWS, 2), "layer_sharding": True, "token_drop": {"capacity_factor": 1.0}}
    passes = [name for name in dict.fromkeys(pipeline.names()) if name not in ("user_rules", *apart)]
    rules = [rule.name for entry in pipeline.selected(Options(**all_on)) for rule in entry.rules]
    keys = [fingerprint({**all_on, "disabled_passes": [name]}) for name in passes]
    keys += [fingerprint({**all_on, "disabled_rules": [name]}) for name in rules]
    keys += [fingerprint(all_on), fingerprint(apart)]
    keys += [fingerprint({**apart, "disabled_passes": [name]}) for name in apart]
    keys += [fingerprint({"weight_nz": policy}) for policy in WEIGHT_NZ if policy != "off"]
    assert len({plain, *keys}) == 1 + len(keys)
    for field in dataclasses.fields(Options):
        if isinstance(field.default, bool) and field.name not in decide_nothing:
            needs = {"attention_exchange": 1} if field.name == "layer_sharding" else {}
            assert fingerprint({**needs, field.name: not field.default}) != fingerprint(needs), field.name


def test_moved_parameter_does_not_leak_the_old_graph() -> None:
    """npugraph_ex without frozen_parameter: an address change makes a new key, and the old graph stays for ever."""
    graphs = alive_graphs()
    module = nn.Linear(4, 4).to("npu")
    compiled = Compiled(module, dynamic=False)
    x = torch.rand(2, 4)
    held = []  # so that no address comes twice
    for _ in range(5):
        weight = torch.rand(4, 4)
        held.append(module.weight.data)
        module.weight.data = weight.npu()
        for _ in range(2):
            assert_same(compiled(x.npu()), x @ weight.t() + module.bias.cpu())
    assert len(compiled.ledger.captures) == 5
    assert all("weight" in entry.reason for entry in compiled.ledger.captures[1:])
    assert alive_graphs() - graphs == 1


def alive_graphs() -> int:
    gc.collect()
    return sum(type(each) is torch.npu.NPUGraph for each in gc.get_objects())


def test_buffer_that_is_assigned_anew() -> None:
    """vllm 11596: a module's buffer that forward assigns (not writes) kept its old value."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            self.count = self.count + 1
            return x * self.count

    expected, module = Counting(), Counting().to("npu")
    compiled = Compiled(module, dynamic=False)
    for _ in range(5):
        x = torch.rand(2)
        assert_same(compiled(x.npu()), expected(x))
        torch.testing.assert_close(module.count.cpu(), expected.count)


def test_augmented_assignment_on_device_tensors() -> None:
    """vllm-ascend 6182: `+=` on an NPU tensor in a captured graph."""

    def step(x: Tensor, total: Tensor) -> Tensor:
        total += x
        x *= 2
        y = x[1:]
        y -= total[1:]
        return y * total[0]

    check(step, [(torch.rand(4), torch.rand(4)) for _ in range(5)], dynamic=False)


def test_size_that_is_no_shape_makes_no_recording() -> None:
    """pytorch 128424, 119640, 196385: a recording for every value of an integer."""
    compiled = Compiled(lambda x, step: (x * 2, step + 1))
    for step in range(2, 9):
        assert compiled(torch.ones(3).npu(), step)[1] == step + 1
    captures = [len(graph.ledger.captures) for graph in compiled.backend.compiled() if graph.ledger]
    assert captures == [1, 1], "one with the number as a constant, one with it as a size"


def test_blocking_copies_of_another_thread_during_a_capture() -> None:
    """vllm-ascend 6002: a copy to the host in one thread and a capture in another: error 107030."""
    from concurrent.futures import ThreadPoolExecutor

    source = torch.arange(8.0).npu()

    def copies() -> bool:
        return all(source.cpu()[7] == 7 for _ in range(200))

    compiled = Compiled(lambda x: (x @ x).cos(), dynamic=True)
    with ThreadPoolExecutor(1) as pool:
        copying = pool.submit(copies)
        for size in range(2, 22):
            compiled(torch.rand(size, size).npu())
        assert copying.result()
    assert len(compiled.ledger.captures) == 20


def test_the_page_lists_every_test() -> None:
    """docs/peers.md names each test of this file, and no file of tests that does not exist."""
    page = (ROOT / "docs/peers.md").read_text()
    here = {name for name in globals() if name.startswith("test_") and name != "test_the_page_lists_every_test"}
    assert here == set(re.findall(r"`(test_\w+)` \|$", page, re.MULTILINE))
    assert not [name for name in re.findall(r"`(tests/[\w/.]+)`", page) if not (ROOT / name).exists()]
