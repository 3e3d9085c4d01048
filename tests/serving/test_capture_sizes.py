"""Default capture sizes cover every decode batch; a list that cannot work is refused with the size that is wrong."""

import pytest

from npu_compiler.aclgraph.buckets import padding
from npu_compiler.serving.capture_sizes import check_capture_sizes, default_capture_sizes

LIMITS = {"max_requests": 8, "query_length": 1, "max_tokens": 64, "decode_only": True}


@pytest.mark.parametrize("requests", [1, 2, 3, 6, 8, 9, 255, 256, 257, 300, 1024])
@pytest.mark.parametrize("query_length", [1, 3])
def test_every_decode_batch_finds_a_graph(requests: int, query_length: int) -> None:
    sizes = default_capture_sizes(requests, query_length, max_tokens=8192)
    check_capture_sizes(sizes, max_requests=requests, query_length=query_length, max_tokens=8192, decode_only=True)
    assert sizes[-1] == requests * query_length


def test_default_sizes_stay_within_a_step() -> None:
    assert default_capture_sizes(256, 1, max_tokens=20) == [1, 2, 3, 4, 5, 6, 7, 8, 16, 20]


@pytest.mark.parametrize(
    ("requests", "graphs", "share"), [(8, 8, 0.0), (20, 10, 0.103), (256, 31, 0.050), (1024, 37, 0.047)]
)
def test_small_batches_run_unpadded_and_all_on_few_graphs(requests: int, graphs: int, share: float) -> None:
    """The table of docs/capture.md."""
    sizes = default_capture_sizes(requests, 1, max_tokens=8192)
    assert {1, 2, 4} <= set(sizes)
    assert len(sizes) == graphs
    assert padding(sizes) <= share


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([], "no size to capture"),
        ([0, 1, 2], "0 can't be captured"),
        ([-4], "-4 can't be captured"),
        ([1, 4, 2], r"ascending.*use \[1, 2, 4\]"),
        ([1, 2, 2], r"without repeats; use \[1, 2\]"),
        ([1, 65], "no batch has 65 tokens.*--max-num-batched-tokens"),
        ([1, 16], "at most 8 tokens.*size 16 would never run.*--max-num-seqs"),
    ],
)
def test_refused(sizes: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_capture_sizes(sizes, **LIMITS)


def test_sizes_above_the_decode_batch_are_fine_for_mixed_graphs() -> None:
    check_capture_sizes([1, 16, 64], **(LIMITS | {"decode_only": False}))


def test_refuses_a_size_that_no_uniform_batch_has() -> None:
    with pytest.raises(ValueError, match="not a multiple of it; use 3"):
        check_capture_sizes([3, 5], max_requests=8, query_length=3, max_tokens=64, decode_only=True)
