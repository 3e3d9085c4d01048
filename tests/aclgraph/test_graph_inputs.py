"""Inputs of captured graphs: which have moved, what is copied as bytes, and what is left for an operator to copy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch_npu

from npu_compiler.aclgraph.graph_inputs import GraphInputs

NZ = 29


@pytest.fixture
def internal_formats() -> Iterator[None]:
    torch.npu.config.allow_internal_format = True
    yield
    torch.npu.config.allow_internal_format = False


def on_npu(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).npu()


def test_moved_names_the_positions_at_another_address() -> None:
    first, second, third = on_npu(4), on_npu(4), on_npu(4)
    inputs = GraphInputs([(0, first.data_ptr()), (2, third.data_ptr())], [])
    assert inputs.moved((first, second, third)) == []
    assert inputs.moved((first, first, third)) == [], "nothing is bound at position 1"
    assert inputs.moved((second, second, second)) == [0, 2]
    first.data = second
    assert inputs.moved((first, second, third)) == [0], "the same object with other memory"


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((3, 5), (5, 1)), ((3, 5), (1, 3)), ((2, 3, 4, 5), (60, 20, 5, 1)), ((), ()), ((0, 4), (4, 1))],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_equal_layouts_are_copied_as_bytes(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
) -> None:
    source = torch.empty_strided(shape, strides, dtype=dtype).copy_(torch.randn(shape) > 0).npu()
    buffer = torch.empty_strided(shape, strides, dtype=dtype, device="npu").fill_(2)
    assert GraphInputs([], [(1, buffer)]).copy((None, source)) == []
    assert torch.equal(buffer.cpu(), source.cpu())


def test_a_source_that_is_the_buffer_is_left_alone() -> None:
    """Whatever its layout is: it holds what the graph reads."""
    buffer = on_npu(4, 4)
    assert GraphInputs([], [(0, buffer), (1, buffer)]).copy((buffer, buffer.t())) == []


@pytest.mark.parametrize(
    ("source", "buffer"),
    [
        (torch.zeros(4, 6), torch.zeros(4, 6).t().contiguous().t()),
        (torch.zeros(4, 6), torch.zeros(4, 6, dtype=torch.int32)),
        (torch.zeros(3, 6), torch.zeros(4, 6)),
        (torch.zeros(1, 6).expand(4, 6), torch.zeros(1, 6).expand(4, 6)),
        (torch.zeros(4, 12)[:, ::2], torch.zeros(4, 12)[:, ::2]),
        (torch.zeros(4, dtype=torch.complex64).conj(), torch.zeros(4, dtype=torch.complex64)),
    ],
    ids=["strides", "dtype", "sizes", "expanded", "gaps", "conjugate"],
)
def test_other_layouts_are_left_for_the_caller(source: torch.Tensor, buffer: torch.Tensor) -> None:
    there = torch.empty_strided(source.shape, source.stride(), dtype=source.dtype, device="npu").fill_(1)
    into = torch.empty_strided(buffer.shape, buffer.stride(), dtype=buffer.dtype, device="npu").fill_(0)
    plain = on_npu(4)
    received = torch.zeros(4, device="npu")
    found = GraphInputs([], [(0, into), (1, received)]).copy((there.conj() if source.is_conj() else there, plain))
    assert found == [0], "and the others are copied"
    assert torch.equal(received.cpu(), plain.cpu())
    assert not into.cpu().any()


def test_sources_elsewhere_and_in_other_formats_are_left_for_the_caller(internal_formats: None) -> None:
    buffer = torch.zeros(32, 32, device="npu")
    half = torch.zeros(32, 32, dtype=torch.float16, device="npu")
    inputs = GraphInputs([], [(0, buffer), (1, half)])
    packed = torch_npu.npu_format_cast(torch.randn(32, 32).half().npu(), NZ)
    assert torch_npu.get_npu_format(packed) == NZ
    assert inputs.copy((torch.ones(32, 32), packed)) == [0, 1]
    assert not buffer.cpu().any() and not half.cpu().any()


def test_copies_wait_for_the_current_stream() -> None:
    source, buffer = torch.zeros(1 << 20, device="npu"), torch.ones(1 << 20, device="npu")
    inputs = GraphInputs([], [(0, buffer)])
    torch.npu.synchronize()
    side = torch.npu.Stream()
    with torch.npu.stream(side):
        for _ in range(20):
            source.add_(1)  # not done by the time of the copy
        inputs.copy((source,))
    side.synchronize()
    assert buffer.cpu().eq(20).all()


@pytest.mark.parametrize("method", ["moved", "copy"])
def test_arguments_that_are_no_tensors_are_refused(method: str) -> None:
    call = getattr(GraphInputs([(1, 0)], [(1, on_npu(4))]), method)
    with pytest.raises(IndexError, match="there is no argument 1, there are 1"):
        call((on_npu(4),))
    with pytest.raises(TypeError, match="argument 1 is no tensor"):
        call((on_npu(4), 7))
    with pytest.raises(TypeError):
        call([on_npu(4), on_npu(4)])
    with pytest.raises(TypeError, match="a buffer has to be a tensor"):
        GraphInputs([], [(0, 7)])  # type: ignore[list-item]


def test_a_refused_copy_says_which_argument() -> None:
    freed = on_npu(4)
    freed.untyped_storage().resize_(0)
    inputs = GraphInputs([], [(0, torch.zeros(4, device="npu")), (1, torch.zeros(4, device="npu"))])
    with pytest.raises(RuntimeError, match=r"copying argument 1 \(16 bytes\) .* aclrtMemcpyAsync returned [1-9]"):
        inputs.copy((on_npu(4), freed))
