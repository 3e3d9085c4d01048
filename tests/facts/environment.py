"""Symbolic sizes as dynamo makes them."""

from __future__ import annotations

import torch
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv


def symbolic(*hints: int) -> list[torch.SymInt]:
    """One backed symbolic size for each hint, all in one shape environment."""
    environment = ShapeEnv()
    sizes = []
    for index, hint in enumerate(hints):
        source = ConstantSource(f"size_{index}")
        symbol = environment.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
        size = environment.create_symintnode(symbol, hint=hint, source=source)
        assert isinstance(size, torch.SymInt)
        sizes.append(size)
    return sizes
