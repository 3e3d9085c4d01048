"""Whether two tensors in one storage have elements in common, told from their sizes, strides and offsets.

The strides of both, each a multiple of the next, number an element's place digit by digit, as hours, minutes and
seconds number a second: a tensor is a range of each digit. Two tensors have nothing in common if one of the digits has
nothing in common. Where sizes are symbolic, no guard is added; what is not known counts as common.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias

from torch import Tensor

from npu_compiler.facts.sizes import Size, at_least

Ranges: TypeAlias = list[tuple[int, Size]]
"""For each stride the first digit and how many there are."""


def may_overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors in one storage may have bytes in common; False is proven."""
    if any(_is_empty(tensor) for tensor in (one, other)):
        return False
    if one.element_size() != other.element_size():
        return True
    if _ends_before(one, other) or _ends_before(other, one):
        return False
    strides = _common_strides(one, other)
    if strides is None:
        return True
    left, right = _ranges(one, strides), _ranges(other, strides)
    if left is None or right is None:
        return True
    return not any(_apart(a, b) or _apart(b, a) for a, b in zip(left, right, strict=True))


def _is_empty(tensor: Tensor) -> bool:
    return any(type(size) is int and size == 0 for size in tensor.shape)


def _ends_before(one: Tensor, other: Tensor) -> bool:
    """Whether the last element of `one` lies before the first of `other`."""
    last = one.storage_offset()
    for size, stride in zip(one.shape, one.stride(), strict=True):
        last = last + (size - 1) * stride
    start = other.storage_offset()
    if type(start) is int and type(last) is int:
        return start > last
    return bool(at_least(start, last + 1, "start"))


def _apart(one: tuple[int, Size], other: tuple[int, Size]) -> bool:
    start, count = one
    return type(count) is int and start + count <= other[0]


def _long(tensor: Tensor) -> list[tuple[Size, Size]]:
    """Size and stride of the dimensions that are not known to have one element."""
    return [pair for pair in zip(tensor.shape, tensor.stride(), strict=True) if type(pair[0]) is not int or pair[0] > 1]


def _common_strides(*given: Tensor) -> Sequence[int] | None:
    """The strides of all tensors, largest first; None if they do not number the elements."""
    found: set[int] = {1}
    for tensor in given:
        strides = [stride for _, stride in _long(tensor)]
        if (
            any(type(stride) is not int or stride <= 0 for stride in strides)
            or max(Counter(strides).values(), default=1) > 1
        ):
            return None
        found.update(strides)
    ordered = sorted(found, reverse=True)
    return ordered if all(large % small == 0 for large, small in pairwise(ordered)) else None


def _ranges(tensor: Tensor, strides: Sequence[int]) -> Ranges | None:
    """The tensor as ranges of digits; None if one of them runs over into the next larger digit."""
    offset = tensor.storage_offset()
    if type(offset) is not int:
        return None
    sizes = {stride: size for size, stride in _long(tensor)}
    found: Ranges = []
    for index, stride in enumerate(strides):
        digit, offset = divmod(offset, stride)
        size = sizes.get(stride, 1)
        if index and (type(size) is not int or digit + size > strides[index - 1] // stride):
            return None
        found.append((digit, size))
    return found
