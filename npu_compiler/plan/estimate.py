"""How long a call takes: estimates from bytes and floating-point operations, to compare plans with one another.

With the constants of graph/device.py. A plan's estimate is good for "is this better than that", not for a figure to
quote.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from npu_compiler.facts.sizes import expression
from npu_compiler.graph.device import Device
from npu_compiler.graph.effects import tensors
from npu_compiler.graph.traffic import Amount, moved_bytes
from npu_compiler.plan.engines import Engine, engine_of

Sizes = Mapping[sympy.Symbol, int]


@dataclass(frozen=True)
class Estimate:
    """A call's engine, its microseconds, the part of the engine that it fills (0 to 1), and the bytes it moves."""

    engine: Engine
    microseconds: float
    part: float
    bytes: float = 0.0


def estimate(node: fx.Node, sizes: Sizes, device: Device) -> Estimate:
    """What a call costs. `sizes`: values of the program's symbols."""
    engine = engine_of(node)
    if engine is Engine.HOST:
        return Estimate(engine, 0.0, 0.0)
    moved = _number(moved_bytes(node), sizes)
    bandwidth = device.link if engine is Engine.LINK else device.memory
    compute = _number(operations(node), sizes) / device.matrix if engine is Engine.MATRIX else 0.0
    part = min(1.0, max(1.0, moved / device.share) / device.cores)
    if engine is Engine.LINK:
        part = 1.0
    return Estimate(engine, device.launch + max(moved / bandwidth, compute), part, moved)


def operations(node: fx.Node) -> Amount:
    """Floating-point operations of a matrix call: twice the result's elements times the first argument's last size."""
    result = next(tensors(node), None)
    first = next((tensor for source in node.all_input_nodes for tensor in tensors(source) if tensor.dim() >= 2), None)
    if result is None or first is None:
        return 0
    total: Amount = 2
    for size in (first.shape[-1], *result.shape):
        total = total * (size if isinstance(size, int) else expression(size))
    return total


def sizes_of(arguments: Mapping[fx.Node, object]) -> dict[sympy.Symbol, int]:
    """Values of the program's symbols, from the values given for its inputs."""
    found: dict[sympy.Symbol, int] = {}
    for node, given in arguments.items():
        size = node.meta.get("val")
        if isinstance(size, torch.SymInt) and isinstance(given, int) and isinstance(size.node.expr, sympy.Symbol):
            found[size.node.expr] = given
    return found


def _number(amount: Amount, sizes: Sizes) -> float:
    if isinstance(amount, int):
        return float(amount)
    known = {symbol: sizes.get(symbol, 1) for symbol in amount.free_symbols}  # 1: a size that only the run knows
    return float(amount.xreplace({symbol: sympy.Integer(size) for symbol, size in known.items()}))
