"""Adding nodes with everything later stages rely on: a fake value, the user's source line, the pass that made it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.utils import detect_fake_mode
from torch.utils._pytree import tree_map

from npu_compiler.graph.effects import value
from npu_compiler.graph.source import origin_of


def call(
    graph: fx.Graph,
    target: Callable[..., Any],
    args: Sequence[Any],
    *,
    replaces: Sequence[fx.Node],
    made_by: str,
    kwargs: Mapping[str, Any] | None = None,
) -> fx.Node:
    """Adds a call at the graph's insertion point and infers its value.

    Args:
        target: an operator with a fake implementation.
        replaces: the nodes whose origin (source line, module path) the new node takes over.
        made_by: name of the pass.
    """
    node = graph.call_function(target, tuple(args), dict(kwargs or {}))
    node.meta.update(origin_of(replaces, made_by))
    fake_args = tree_map(lambda arg: value(arg), node.args)
    fake_kwargs = tree_map(lambda arg: value(arg), node.kwargs)
    mode = detect_fake_mode((fake_args, fake_kwargs, [value(node) for node in replaces]))
    if mode is None:
        raise RuntimeError(f"{made_by}: no fake value among the arguments of {target}; lower the graph first")
    with mode, torch.no_grad():
        node.meta["val"] = target(*fake_args, **fake_kwargs)
    return node
