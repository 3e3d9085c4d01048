"""Every fused operator and every provider of it against its reference in float64, and its fake against its result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from npu_compiler.fusion_kernels import OPERATORS, register
from npu_compiler.fusion_kernels.operator import FusedOperator, Provider, missing_kernel
from npu_compiler.fusion_kernels.rope import QK_NORM_ROPE, QK_ROPE
from tests.one_rank import one_rank

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
MOST_STEPS = 0.02  # part of the int8 values that may be one step off
MOST_STEPS_APART = 0.25  # where two kernels round in between: to bfloat16 that is up to a quarter of a step
DEVICES = ["cpu", "npu"]
ELSEWHERE = {
    "Triton": "test_triton.py",
    "vllm-ascend's npu_add_rms_norm_bias": "test_custom_library.py",
    "aclnnMoeDistributeDispatchV2": "two ranks or more: tests/runtime/test_expert_exchange.py",
    "aclnnMoeDistributeCombineV2": "as above",
}
"""Where providers are tested that are not here."""


def cases() -> Iterator[Any]:
    for entry in OPERATORS:
        for provider in entry.providers:
            if provider.name in ELSEWHERE:
                continue
            yield pytest.param(entry, provider, id=f"{entry.name}-{provider.name}")


def place(value: Any, device: str) -> Any:
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, value)


def error(got: Any, expected: Any, most_steps: float = MOST_STEPS) -> float:
    """The largest error as a part of the largest value; 1 for int8 values more than a step off, or in many places."""
    worst = 0.0
    for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        if b.dtype == torch.int8:
            steps = (a.cpu().int() - b.int()).abs()
            worst = max(worst, 0.0 if steps.max() <= 1 and (steps > 0).double().mean() < most_steps else 1.0)
            continue
        difference = (a.cpu().double() - b).abs().max() / b.abs().max()
        worst = max(worst, float(difference))
    return worst


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    register()
    with one_rank():  # for operators that communicate
        yield


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("entry", "provider"), cases())
def test_provider(entry: FusedOperator, provider: Provider, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    args = entry.example(dtype)
    if provider.name == "aclnnApplyRotaryPosEmbV2":
        args = wider_heads(args)
    device = "npu" if provider.needs else "cpu"
    on_device = place(args, device)
    refusal = provider.refuses(*on_device)
    if refusal and dtype is torch.float32:  # operators for half precision say so, and take both kinds
        assert "torch.float32 is not float16 or bfloat16" in refusal
        return
    assert not refusal
    exact = entry.reference(*map(widened, args))
    steps = MOST_STEPS_APART if " and " in provider.name else MOST_STEPS
    assert error(provider.run(*on_device), exact, steps) < TOLERANCE[dtype]


def widened(value: Any) -> Any:
    """A tensor of floats as float64, anything else as it is."""
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def wider_heads(args: Any) -> Any:
    """The example with heads of 128 elements, which the paired operator asks for."""
    return [arg.repeat_interleave(2, dim=-1) if isinstance(arg, torch.Tensor) else arg for arg in args]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("entry", OPERATORS, ids=lambda entry: entry.name)
def test_operator_leaves_its_arguments_alone_and_its_fake_is_true(entry: FusedOperator, device: str) -> None:
    args = place(entry.example(torch.float32), device)
    before = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, args)
    operator = getattr(torch.ops.npu_fused, entry.name)
    result = operator(*args)
    for a, b in zip(tree_leaves(args), tree_leaves(before), strict=True):
        assert torch.equal(a.cpu(), b.cpu()) if isinstance(a, torch.Tensor) else a == b
    with FakeTensorMode() as mode:
        fake = operator(
            *tree_map(lambda leaf: mode.from_tensor(leaf) if isinstance(leaf, torch.Tensor) else leaf, args)
        )
    for a, b in zip(tree_leaves(result), tree_leaves(fake), strict=True):
        assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)
    inputs = {arg.untyped_storage().data_ptr() for arg in tree_leaves(args) if isinstance(arg, torch.Tensor)}
    assert not inputs & {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(result)}


@pytest.mark.parametrize("entry", OPERATORS, ids=lambda entry: entry.name)
def test_provider_follows_availability(entry: FusedOperator) -> None:
    """On host tensors nothing of CANN's has a kernel; on the device the first provider that can takes over."""
    args = entry.example(torch.float32)
    assert entry.provider(*args).name == "composition"
    on_device = place(args, "npu")
    available = [provider for provider in entry.providers if not missing_kernel(provider, on_device)]
    expected = next(provider for provider in available if not provider.refuses(*on_device))
    assert entry.provider(*on_device) is expected
    integers = tuple(arg.int() if isinstance(arg, torch.Tensor) else arg for arg in on_device)
    assert entry.provider(*integers).name == "composition"


@pytest.mark.parametrize("entry", [QK_ROPE, QK_NORM_ROPE], ids=lambda entry: entry.name)
def test_documented_limits_of_the_rotation(entry: FusedOperator) -> None:
    """aclnnRotaryPositionEmbedding takes fewer than 1000 heads: more fall to the composition."""
    args = list(place(entry.example(torch.float32), "npu"))
    args[0] = args[0].repeat(1, 250, 1)
    assert entry.provider(*args).name == "composition"
