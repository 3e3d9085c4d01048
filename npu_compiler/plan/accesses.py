"""What a call touches: the buffers it reads and writes, as identities of storages.

Three kinds of hidden state are buffers too: the random generator, which draws advance; what operators know by a layer's
name (KV caches), which no tensor of a program shares; and whatever another operator with an effect outside of its
schema may touch (a print), which everything depends on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from npu_compiler.graph.effects import storage, tensors, written_storages
from npu_compiler.graph.traffic import launches
from npu_compiler.plan.engines import Engine, engine_of

GENERATOR = -1
UNKNOWN = -2
LAYERS = -3
HIDDEN = frozenset({GENERATOR, UNKNOWN, LAYERS})
LAYER = "layer_name"
"""The argument by which vLLM's operators find a layer, and with it what no schema names: its KV cache, its lengths."""


@dataclass(frozen=True)
class Accesses:
    """Buffers that a call reads, and those it writes (its results among them)."""

    reads: frozenset[int]
    writes: frozenset[int]


def accesses(node: fx.Node) -> Accesses:
    """What `node` touches on the device; nothing for a view or arithmetic on sizes."""
    if not launches(node):
        return Accesses(frozenset(), frozenset())
    reads = {storage(tensor) for source in node.all_input_nodes for tensor in tensors(source)} | {UNKNOWN}
    writes = written_storages(node) | ({storage(tensor) for tensor in tensors(node)} - reads)
    if is_opaque(node):
        writes.add(UNKNOWN)
    if _draws(node):
        writes.add(GENERATOR)
    if _knows_a_layer(node):
        writes.add(LAYERS)
    return Accesses(frozenset(reads - writes), frozenset(writes))


def is_opaque(node: fx.Node) -> bool:
    """Whether a call may touch what its schema does not name."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return True
    if _draws(node):
        return False
    named = bool(written_storages(node)) or not target._schema.is_mutable
    return not named or (node.is_impure() and not target._schema.is_mutable) or not _has_result(node)


def is_pinned(node: fx.Node) -> bool:
    """Whether a call must stay on the main stream: hidden effects, random draws, collectives (which bring their own
    streams along), attention that is updated between replays."""
    return is_opaque(node) or _draws(node) or _knows_a_layer(node) or engine_of(node) is Engine.LINK


def _draws(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _knows_a_layer(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and any(entry.name == LAYER for entry in target._schema.arguments)


def _has_result(node: fx.Node) -> bool:
    return bool(written_storages(node)) or any(True for _ in tensors(node))
