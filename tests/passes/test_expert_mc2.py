"""MC2 by expert_communication: rows go to the experts of other ranks and back as CANN's operators do it. Ranks are
threads (tests/world.py); processes are in test_expert_exchange.py of tests/runtime."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch_npu
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn import functional

from npu_compiler import fusion_kernels
from npu_compiler.errors import OptionError
from npu_compiler.fusion_kernels.expert_limits import LIMITS, refusal
from npu_compiler.passes import expert_communication
from npu_compiler.passes.expert_choice import ALLTOALL, MC2
from npu_compiler.passes.record import Pass, PassRecord
from npu_compiler.plan import agreement
from tests import world
from tests.experts import Case, owned
from tests.passes import test_token_drop as experts
from tests.passes.lowered import apply, calls

HIDDEN, INNER = 1024, 16
DISPATCH, COMBINE = "npu_fused.mc2_dispatch.default", "npu_fused.mc2_combine.default"
DISPATCH_QUANT, QUANT = "npu_fused.mc2_dispatch_quant.default", "npu.npu_dynamic_quant.default"
ALONE = "alone"


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    fusion_kernels.register()


def inputs(case: Case, rank: int, dtype: torch.dtype = torch.bfloat16, hidden: int = HIDDEN) -> list[Tensor]:
    """As of test_token_drop, with rows that MC2's operators take."""
    _, ids, weights = case.inputs()
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(case.tokens, hidden, generator=draw)
    w13 = torch.randn(case.experts, hidden, 2 * INNER, generator=draw) / hidden**0.5
    w2 = torch.randn(case.experts, INNER, hidden, generator=draw) / INNER**0.5
    own = torch.randn(case.ranks, hidden, hidden, generator=draw) / hidden**0.5
    local = owned(case, rank)
    halves = [item.to(dtype).npu() for item in (x, w13[local], w2[local], own[rank])]
    return [halves[0], ids.npu(), weights.float().npu(), *halves[1:]]


def expected(case: Case) -> Tensor:
    """In float64."""
    each = [[item.cpu().double() for item in inputs(case, rank)] for rank in range(case.ranks)]
    x, ids, weights = each[0][:3]
    w13, w2 = (torch.cat([one[index] for one in each]) for index in (3, 4))
    total = torch.zeros(case.tokens, HIDDEN, dtype=torch.float64)
    for token in range(case.tokens):
        for j, expert in enumerate(ids[token].int().tolist()):
            gate, up = (x[token] @ w13[expert]).chunk(2)
            total[token] += weights[token, j] * ((functional.silu(gate) * up) @ w2[expert])
    return total


def faked(given: list[Tensor], dynamic: bool) -> list[Tensor]:
    """Without values; the number of tokens, dimension 0 of the first three, is a symbol if `dynamic`."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    kinds = [DimDynamic.DYNAMIC if dynamic and index < 3 else DimDynamic.STATIC for index in range(len(given))]
    contexts = [
        StatelessSymbolicContext([kind, *[DimDynamic.STATIC] * (item.dim() - 1)])
        for kind, item in zip(kinds, given, strict=True)
    ]
    return [
        mode.from_tensor(item, symbolic_context=context, source=ConstantSource(f"input_{0 if index < 3 else index}"))
        for index, (item, context) in enumerate(zip(given, contexts, strict=True))
    ]


def rewritten(case: Case, made: Any = experts.layer, dynamic: bool = False, **settings: Any) -> tuple[list[Any], Any]:
    """The program of each rank, and what the pass noted on rank 0."""
    programs, records = [], []
    for rank in range(case.ranks):
        with world.group_of(case.ranks, rank), world.named(ALONE), torch.no_grad():
            program = make_fx(made(rank, case.ranks), tracing_mode="real")(*faked(inputs(case, rank), dynamic))
            run = lambda module, record: expert_communication.run(  # noqa: E731
                module, record, **{"soc": "A3", "captured": 64, "tokens": 64, "alone": ALONE} | settings
            )
            records.append(apply(Pass(expert_communication.NAME, "", run), program))
            programs.append(program)
    return programs, records[0]


def run(programs: list[fx.GraphModule], case: Case) -> list[Tensor]:
    given = [inputs(case, rank) for rank in range(case.ranks)]

    def of(rank: int) -> Tensor:
        with world.named(ALONE):
            return programs[rank](*given[rank])

    return [item.cpu() for item in world.together(case.ranks, of, devices=("cpu", "npu"))]


CASES = [
    (2, 12, "skewed"),
    pytest.param(2, 1, "random", marks=pytest.mark.full),
    pytest.param(4, 7, "one rank", marks=pytest.mark.full),
    pytest.param(4, 8, "balanced", marks=pytest.mark.full),
]


@pytest.mark.parametrize(("ranks", "tokens", "kind"), CASES)
def test_the_bits_of_all_to_all(ranks: int, tokens: int, kind: str) -> None:
    """Same rows to same experts, and a token's results are summed in the same order: no bit differs. Also of routings
    that send one rank everything, and of ranks without a token."""
    case = Case(ranks, experts.EXPERTS, experts.K, tokens, kind, 1.0)
    programs, record = rewritten(case, dynamic=tokens > 1)
    (fired,) = record.fired
    assert fired.rule == f"expert_communication: MC2 (A3: it fits), 4 experts on {ranks} ranks, 2 a token"
    found = calls(programs[0])
    assert [found.count(name) for name in (DISPATCH, COMBINE, experts.GATHER)] == [1, 1, 1]
    assert not any("routing" in name or "all_reduce" in name for name in found)
    by_all_to_all, _ = rewritten(case, dynamic=tokens > 1, asked=ALLTOALL)
    for got, other in zip(run(programs, case), run(by_all_to_all, case), strict=True):
        assert torch.equal(got, other)
        # two products, an activation and the sum, each rounded to bfloat16
        torch.testing.assert_close(got.double(), expected(case), rtol=4 * 2**-8, atol=4 * 2**-8)


def test_a_shared_expert_meets_whole_rows() -> None:
    case = Case(2, experts.EXPERTS, experts.K, 6, "random", 1.0)
    programs, _ = rewritten(case, experts.with_shared_expert)
    assert experts.UNSHARD in calls(programs[0])
    each = [inputs(case, rank) for rank in range(2)]
    wanted = 2.5 * expected(case) + sum(one[0].cpu().double() @ one[5].cpu().double() for one in each)
    for got in run(programs, case):
        torch.testing.assert_close(got.double(), wanted, rtol=8 * 2**-8, atol=8 * 2**-8)


def int8_product(rows: Tensor, row_scales: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Rows in int8 with a scale each; weights [experts, in, out] are quantized by column here."""
    scale = (weight.float().abs().amax(1) / 127).bfloat16()
    values = (weight.float() / scale.float().unsqueeze(1)).round().clamp(-127, 127).to(torch.int8)
    return torch_npu.npu_grouped_matmul(
        [rows], [values], scale=[scale], per_token_scale=[row_scales],
        group_list=counts, split_item=3, group_type=0, group_list_type=1, output_dtype=torch.bfloat16,
    )[0]  # fmt: skip


def quantized_experts(where: str) -> Any:
    """Experts of int8 weights (w8a8 dynamic), whose rows are quantized in the routing, or behind it."""

    def made(rank: int, ranks: int) -> experts.Program:
        local = owned(Case(ranks, experts.EXPERTS, experts.K, 1, "", 1.0), rank)

        def program(x, ids, weights, w13, w2, *_):  # type: ignore[no-untyped-def]
            rows, places, counts, scales = torch_npu.npu_moe_init_routing_v2(
                x, ids, active_num=-1, active_expert_range=[local[0], local[-1] + 1], expert_num=experts.EXPERTS,
                expert_tokens_num_type=1, expert_tokens_num_flag=True, row_idx_type=0,
                quant_mode=1 if where == "routing" else -1,
            )  # fmt: skip
            if where != "routing":
                smooth = w13[0, :, 0].abs() + 1 if where == "smoothed" else None
                rows, scales = torch_npu.npu_dynamic_quant(rows, smooth_scales=smooth)
            gated = torch.ops.npu_fused.swiglu(int8_product(rows, scales, w13, counts))
            rows, scales = torch_npu.npu_dynamic_quant(gated)
            rows = int8_product(rows, scales, w2, counts).unsqueeze(1)
            return experts.summed(
                torch_npu.npu_moe_finalize_routing(rows, None, None, None, weights, places, None, drop_pad_mode=3)
            )

        return program

    return made


@pytest.mark.parametrize("where", ["routing", "behind"])
@pytest.mark.parametrize(("ranks", "tokens", "kind"), CASES)
def test_rows_that_experts_quantize_are_sent_as_int8(where: str, ranks: int, tokens: int, kind: str) -> None:
    """Half the bytes, and the bits of the same layer whose rows are sent as they are and quantized then."""
    case = Case(ranks, experts.EXPERTS, experts.K, tokens, kind, 1.0)
    programs, record = rewritten(case, quantized_experts(where), dynamic=tokens > 1)
    (fired,) = record.fired
    assert fired.rule == (
        f"expert_communication: MC2 (A3: it fits), 4 experts on {ranks} ranks, 2 a token, rows sent as int8"
    )
    found = calls(programs[0])
    assert [found.count(name) for name in (DISPATCH_QUANT, DISPATCH, COMBINE, QUANT)] == [1, 0, 1, 1]
    assert not any("routing" in name or "all_reduce" in name for name in found)
    by_all_to_all, _ = rewritten(case, quantized_experts(where), dynamic=tokens > 1, asked=ALLTOALL)
    assert calls(by_all_to_all[0]).count(QUANT) == (1 if where == "routing" else 2)
    for got, other in zip(run(programs, case), run(by_all_to_all, case), strict=True):
        assert torch.equal(got, other)
        # four roundings to steps of 1/127 of the largest number of a row or column
        wanted = expected(case)
        assert (got.double() - wanted).abs().max() <= 4 / 127 * wanted.abs().max()


def test_rows_that_are_smoothed_before_are_sent_as_they_are() -> None:
    case = Case(2, experts.EXPERTS, experts.K, 6, "random", 1.0)
    programs, record = rewritten(case, quantized_experts("smoothed"))
    assert "int8" not in record.fired[0].rule
    found = calls(programs[0])
    assert [found.count(name) for name in (DISPATCH_QUANT, DISPATCH, QUANT)] == [0, 1, 2]
    by_all_to_all, _ = rewritten(case, quantized_experts("smoothed"), asked=ALLTOALL)
    for got, other in zip(run(programs, case), run(by_all_to_all, case), strict=True):
        assert torch.equal(got, other)


def test_its_group_is_for_the_two_alone() -> None:
    """Ranks compare what they planned for it in the group of the sum."""
    case = Case(2, experts.EXPERTS, experts.K, 6, "random", 1.0)
    (program, _), _ = rewritten(case)
    with world.group_of(2), world.named(ALONE):
        plans = agreement.planned(program.graph)
        assert [text.split(" ")[0] for text in plans[ALONE].collectives] == [DISPATCH, COMBINE]
        assert agreement._talk_in(ALONE, plans) == agreement._talk_in("0", plans) == "0"
        assert agreement._talk_in(ALONE, {ALONE: plans[ALONE]}) == ""


REFUSED = (
    ({"alone": ""}, "the option expert_group names none"),
    ({"alone": "0"}, "which has to be MC2's alone"),
    ({"alone": "nobody"}, "has not the ranks of '0'"),
    ({"soc": "A2"}, "2 ranks, A2 takes 16, 32, 64, 128, 256"),
    ({"soc": "310P"}, "the operators are for A2 and A3, not for 310P"),
    ({"tokens": 1026}, "up to 513 tokens a rank, A3 takes 512"),
)


@pytest.mark.parametrize(("settings", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_refused_by_name(settings: dict[str, Any], reason: str) -> None:
    case = Case(2, experts.EXPERTS, experts.K, 6, "random", 1.0)
    with pytest.raises(OptionError) as caught:
        rewritten(case, asked=MC2, **settings)
    assert "expert_communication='mc2' can't be done: " in str(caught.value) and reason in str(caught.value)


def test_a_number_of_tokens_that_is_not_known_is_refused() -> None:
    case = Case(2, experts.EXPERTS, experts.K, 6, "random", 1.0)
    with pytest.raises(OptionError, match="at most 512 tokens a rank are taken, and tokens of a step"):
        rewritten(case, dynamic=True, asked=MC2, tokens=0)


def test_the_table_takes_the_next_row_and_says_why() -> None:
    case = Case(2, experts.EXPERTS, experts.K, 6, "random", 1.0)
    programs, record = rewritten(case, alone="")
    assert DISPATCH not in calls(programs[0])
    assert record.fired[0].rule.startswith(
        "expert_communication: ALLTOALL (A3: what MC2 does not take; MC2 not: it needs a process group for itself"
    )


LIMITED = (
    ("A3", {"dtype": torch.float32}, "rows are torch.float32"),
    ("A3", {"hidden": 1000}, "rows of 1000, A3 takes 1024 to 8192"),
    ("A2", {"ranks": 16, "hidden": 40}, "rows of 40, A2 takes 32 to 7168 in steps of 32"),
    ("A2", {"ranks": 16, "experts": 400}, "400 experts, A2 takes 512, and 24 a rank"),
    ("A2", {"ranks": 16, "tokens": 257}, "up to 257 tokens a rank, A2 takes 256"),
    ("A3", {"top_k": 17}, "17 experts a token"),
    ("A3", {"experts": 33}, "33 experts can't be spread evenly over 2 ranks"),
    ("A3", {"experts": 1026}, "1026 experts, A3 takes 1024"),
    ("A3", {"tokens": 512, "hidden": 8192}, "HCCL_BUFFSIZE is 200 (MiB), "),
    ("", {}, "not for an unknown chip"),
)


@pytest.mark.parametrize(("soc", "changes", "reason"), LIMITED)
def test_what_the_pages_exclude(soc: str, changes: dict[str, Any], reason: str) -> None:
    fits: dict[str, Any] = {"ranks": 2, "experts": 32, "top_k": 4, "tokens": 8, "hidden": 1024, "dtype": torch.float16}
    assert refusal("A3", **fits) == refusal("A2", **fits | {"ranks": 16}) == ""
    assert reason in refusal(soc, **fits | changes)
    assert set(LIMITS) == {"A2", "A3"}


def test_the_buffer_that_is_there_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2 * (16 * 512 * 2 * 16896 + 5 * 512 * 16384) bytes: 608 MiB."""
    large: dict[str, Any] = {"ranks": 2, "experts": 32, "top_k": 4, "tokens": 512, "hidden": 8192}
    assert refusal("A3", **large, dtype=torch.float16) == "HCCL_BUFFSIZE is 200 (MiB), 608 are needed"
    monkeypatch.setenv("HCCL_BUFFSIZE", "608")
    assert refusal("A3", **large, dtype=torch.float16) == ""


def test_a_layer_of_another_form_stays() -> None:
    case = Case(2, experts.EXPERTS, experts.K, 6, "random", 1.0)
    with world.group_of(2), world.named(ALONE), torch.no_grad():
        program = make_fx(experts.not_summed, tracing_mode="fake")(*inputs(case, 0))
        before = calls(copy.deepcopy(program))
        with pytest.raises(OptionError, match="expert_communication='mc2' can't be done: output reads"):
            expert_communication.run(program, PassRecord(""), asked=MC2, soc="A3", tokens=64, alone=ALONE)
        assert calls(program) == before
