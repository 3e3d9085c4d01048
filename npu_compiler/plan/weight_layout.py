"""Which weights are laid out in FRACTAL_NZ, the order in which matrix units read them.

A matrix [rows, columns] in that format is cut into fractals of 16 rows by 32 bytes of columns, ordered by columns and
each of them by rows; what does not fill a fractal is zero. A kernel that is given plain rows rearranges them whenever
it runs; one that is given fractals does not. (CANN's documents on data formats; its number is 29.)

Candidates are inputs that matrix products read as their second operand and nothing else reads. They are converted in
place before a program's first call: the parameter keeps its shape and meaning, its old storage is freed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from npu_compiler.graph.effects import value
from npu_compiler.graph.source import operator_name
from npu_compiler.plan.first_call import before_first
from npu_compiler.units import in_bytes

logger = logging.getLogger(__name__)
FRACTAL_NZ = 29
FRACTAL_ROWS, FRACTAL_BYTES = 16, 32
HALF = (torch.float16, torch.bfloat16)
SECOND_OPERAND = {
    "aten.mm.default": 1,
    "aten.matmul.default": 1,
    "aten.linear.default": 1,
    "aten.addmm.default": 2,
    "npu.npu_quant_matmul.default": 1,
}
"""Products, and the position of the weight among their arguments. Their kernels take it in either layout."""
GROUPED = {"npu.npu_grouped_matmul.default": 1}
"""The same for products of experts, whose weights [experts, rows, columns] are lists of one. Packed ones have to fill
their fractals (ops-transformer, gmm/grouped_matmul/op_host)."""
PLAIN_ONLY = {"npu_fused.matmul_all_reduce.default": 1}
"""The same for products whose kernel takes plain rows only (ND, in CANN's page on aclnnMatmulAllReduce)."""
TURNED = frozenset({"aten.t.default", "aten.transpose.int", "aten.permute.default"})
LARGE = 256
"""Rows and columns from which "auto" converts; an assumption about what is worth it, measured on no card."""


@dataclass(frozen=True)
class Weight:
    """A candidate: the position among the program's inputs, its name, and whether it is a matrix for each expert."""

    position: int
    name: str
    grouped: bool = False


@dataclass
class Layout:
    """What became of a program's weights.

    Attributes:
        candidates: what the program allows.
        converted: names, with bytes before and after.
        left: names of weights that stay as they are, with the reason.
    """

    policy: str
    candidates: tuple[Weight, ...]
    converted: dict[str, tuple[int, int]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        before, after = (sum(sizes[i] for sizes in self.converted.values()) for i in (0, 1))
        lines = [f"weights: {len(self.converted)} in FRACTAL_NZ, {in_bytes(before)} before and {in_bytes(after)} after"]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        lines += [f"  left {_some(names)}: {reason}" for reason, names in reasons.items()]
        return "\n".join(lines)


def planned(graph: fx.Graph, policy: str) -> Layout | None:
    """The weights of a program that its products alone read; None for the policy "off".

    Args:
        policy: "off"; "quantized": of int8 products; "all"; "auto": those whose size makes it pay (LARGE).
    """
    if policy == "off":
        return None
    layout = Layout(policy, ())
    found = []
    for position, node in enumerate(graph.find_nodes(op="placeholder")):
        if not isinstance(value(node), Tensor) or not _feeds_a_product(node):
            continue
        reason = _other_reader(node)
        if reason:
            layout.left[node.name] = reason
        else:
            found.append(Weight(position, node.name, _is_grouped(node)))
    layout.candidates = tuple(found)
    return layout


def applied(call: Callable[..., Any], layout: Layout | None) -> Callable[..., Any]:
    """`call`, which converts the weights in front of its first call; `call` itself where there are none."""
    if layout is None or not layout.candidates:
        return call

    def lay_out(args: Sequence[Any]) -> bool:
        if torch.npu.is_current_stream_capturing():
            return False
        convert(layout, args)
        logger.info("%s", layout)
        return True

    return before_first(call, lay_out)


def convert(layout: Layout, args: Sequence[Any]) -> None:
    """Converts the parameters among a program's arguments, in place; notes what was converted and what was not."""
    for weight in layout.candidates:
        given = args[weight.position]
        reason = _why_not(given, layout.policy, weight.grouped)
        if reason:
            layout.left[weight.name] = reason
            continue
        before = given.untyped_storage().nbytes()
        torch.npu.config.allow_internal_format = True  # torch_npu makes no tensor in this format otherwise
        with torch.no_grad():
            torch.ops.npu.npu_format_cast_(given, FRACTAL_NZ)
        layout.converted[weight.name] = (before, given.untyped_storage().nbytes())


def _why_not(given: Any, policy: str, grouped: bool) -> str:
    """Why an argument stays as it is; empty if it is to be converted. `grouped`: it has a matrix for each expert."""
    if not isinstance(given, torch.nn.Parameter):
        return "no parameter"
    if given.device.type != "npu":
        return "not on the device"
    if given.dim() != (3 if grouped else 2):
        return f"{given.dim()} dimensions"
    if int(torch.ops.npu.get_npu_format(given)) == FRACTAL_NZ:
        return "in FRACTAL_NZ already"
    if not given.is_contiguous() or given.untyped_storage().nbytes() != given.numel() * given.element_size():
        return "a part of a larger tensor"
    if given.dtype != torch.int8 and (given.dtype not in HALF or policy == "quantized"):
        return f"{given.dtype}, which the policy {policy!r} leaves" if given.dtype in HALF else f"{given.dtype}"
    if grouped and _padding(given):
        return "does not fill its fractals, which npu_grouped_matmul asks for"
    if policy == "auto" and (min(given.shape[-2:]) < LARGE or _padding(given)):
        return f"smaller than {LARGE}, or padded: not worth it by the policy 'auto'"
    return ""


def _padding(given: Tensor) -> int:
    """Elements that the format adds to fill its fractals, to each matrix."""
    rows, columns = given.shape[-2:]
    wide = FRACTAL_BYTES // given.element_size()
    return -(-rows // FRACTAL_ROWS) * FRACTAL_ROWS * (-(-columns // wide) * wide) - rows * columns


def _feeds_a_product(node: fx.Node) -> bool:
    return any(_is_second_operand(*read, SECOND_OPERAND | PLAIN_ONLY | GROUPED) for read in _readers(node))


def _is_grouped(node: fx.Node) -> bool:
    return any(str(user.target) in GROUPED for _, user in _readers(node))


def _other_reader(node: fx.Node) -> str:
    """What else reads a weight; empty if only products do."""
    other = next((user for reader, user in _readers(node) if not _is_second_operand(reader, user)), None)
    if other is None:
        return ""
    how = ", which takes plain rows only" if str(other.target) in PLAIN_ONLY else ""
    return f"also read by {operator_name(other.target)}{how}"


def _readers(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """The calls that read a weight, each with the (transposed) node that it reads it by."""
    found: list[tuple[fx.Node, fx.Node]] = []
    for user in node.users:
        found += _readers(user) if str(user.target) in TURNED else [(node, user)]
    return found


def _is_second_operand(reader: fx.Node, user: fx.Node, products: Mapping[str, int] = SECOND_OPERAND | GROUPED) -> bool:
    place = products.get(str(user.target))
    arguments = [index for index, item in enumerate(user.args) if item is reader or _is_one_of(reader, item)]
    if arguments != [place] or reader in user.kwargs.values():
        return False
    if str(user.target) not in GROUPED:
        return True
    return user.args[place] == [reader] and not user.kwargs.get("antiquant_scale")


def _is_one_of(reader: fx.Node, item: Any) -> bool:
    return isinstance(item, (list, tuple)) and any(part is reader for part in item)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
