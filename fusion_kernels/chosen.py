"""Which provider each fused operator of a program gets, for the report.

A provider is chosen at every call, from the tensors at hand. For the report it is chosen once more, from fake tensors
of the sizes that the program was traced with, in a fresh fake mode: a provider's questions about a size guard nothing.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map

from npu_compiler.fusion_kernels.registry import NAMESPACE, OPERATORS


def providers(graph: fx.Graph) -> list[str]:
    """One line for each fused operator and provider: how often, and why the providers before it were passed over."""
    counts: Counter[tuple[str, str, str]] = Counter()
    operators = {f"{NAMESPACE}.{entry.name}.default": entry for entry in OPERATORS}
    for node in graph.nodes:
        entry = operators.get(str(node.target))
        if entry is None:
            continue
        with FakeTensorMode():
            args = tree_map(lambda arg: _concrete(arg), node.args)
            counts[entry.name, entry.provider(*args).name, "; ".join(entry.passed_over(*args))] += 1
    return [
        f"{name} x{count}: {provider}" + (f" (not {reasons})" if reasons else "")
        for (name, provider, reasons), count in counts.items()
    ]


def _concrete(item: Any) -> Any:
    """An argument's fake value, with the sizes it had when it was traced in place of symbols."""
    if isinstance(item, fx.Node):
        item = item.meta.get("val")
    if isinstance(item, torch.SymInt):
        return item.node.hint
    if not isinstance(item, torch.Tensor):
        return item
    shape, stride = ([_concrete(size) for size in sizes] for sizes in (item.shape, item.stride()))
    return torch.empty_strided(shape, stride, dtype=item.dtype, device=item.device)
