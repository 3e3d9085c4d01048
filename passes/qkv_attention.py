"""Hands vLLM's attention the packed QKV projection, where what lies between is only the split, norms and rotation.

Before::

    parts = aten.split_with_sizes.default(qkv, [512, 256, 256], -1)
    q_out, k_out = npu_fused.qk_norm_rope(view(parts[0]), view(parts[1]), q_weight, k_weight, 1e-06, 1e-06, cos, sin)
    auto_functionalized_v2(vllm.unified_attention_with_output, query=q_out, key=k_out, value=view(parts[2]), ...)

After::

    auto_functionalized_v2(npu_serving.qkv_attention, qkv=qkv, q_weight=q_weight, k_weight=k_weight, epsilon=1e-06,
                           cos=squeeze(cos, 1), sin=squeeze(sin, 1), ...)

CANN's aclnnQkvRmsNormRopeCache then does all of it, the write of keys and values to the paged cache included, in one
kernel. Its limits are this pass's: float16 or bfloat16, head size 128, both norms with one epsilon, the whole head
rotated by halves, as many key heads as value heads.

The operator belongs to the vLLM plugin, which adds this pass to the pipeline of what it compiles
(npu_compiler/serving/options.py): only there does the operator exist.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from npu_compiler.facts.sizes import Fact, equal, known, same_shape
from npu_compiler.graph.build import call
from npu_compiler.graph.effects import is_functionalized
from npu_compiler.graph.source import origin_of
from npu_compiler.passes.pattern import VIEWS
from npu_compiler.passes.record import Pass, PassRecord, Saving
from npu_compiler.passes.rewrite import erase_unused

NAME = "qkv_attention"
ATTENTION = "vllm.unified_attention_with_output.default"
FUSED = "npu_fused.qk_norm_rope.default"
HEAD_SIZE = 128  # aclnnQkvRmsNormRopeCache: D must be 128
DTYPES = (torch.float16, torch.bfloat16)  # same


@dataclass(frozen=True)
class Packed:
    """An attention whose query, key and value come from one projection.

    Attributes:
        qkv: the projection, [tokens, (query heads + 2 * kv heads) * D].
        fused: the norm and rotation of q and k.
        nodes: what the attention no longer needs, unless somebody else does.
    """

    qkv: fx.Node
    fused: fx.Node
    nodes: tuple[fx.Node, ...]


def run(module: fx.GraphModule, record: PassRecord) -> None:
    for node in list(module.graph.nodes):
        if not (is_functionalized(node) and str(node.args[0]) == ATTENTION):
            continue
        packed, verdict = _packed(node)
        if packed is not None:
            verdict = _legal(packed, node)
        if packed is None or not verdict:
            record.refuse(NAME, node, verdict.text)
        else:
            _rewrite(module.graph, node, packed, record)


def _packed(attention: fx.Node) -> tuple[Packed | None, Fact]:
    """What the attention reads, seen through views; None with the reason where it is not one projection."""
    query, key, value = (attention.kwargs[name] for name in ("query", "key", "value"))
    nodes: list[fx.Node] = []
    fused, order = _part(query, nodes)
    if str(getattr(fused, "target", "")) != FUSED or order != 0 or _part(key, nodes) != (fused, 1):
        apart = known(False, "query and key are not normalised and rotated by one operator")
        return None, takes(query.meta["val"]) & apart  # type: ignore[union-attr]
    assert fused is not None
    parts = [_part(source, nodes) for source in (fused.args[0], fused.args[1], value)]
    split = parts[0][0]
    if split is None or str(split.target) != "aten.split_with_sizes.default":
        return None, known(False, "query is no part of a split projection")
    if parts != [(split, 0), (split, 1), (split, 2)] or len(split.args[1]) != 3:  # type: ignore[arg-type]
        return None, known(False, "query, key and value are not the three parts of one projection")
    qkv = split.args[0]
    assert isinstance(qkv, fx.Node)
    return Packed(qkv, fused, (split, fused, *nodes)), known(True, "one projection")


def takes(heads: torch.Tensor) -> Fact:
    """Whether the kernel has the dtype and the head size of `heads`, [tokens, heads, D].

    qk_norm_rope.py asks before it leaves norms and rotation to this pass.
    """
    return known(heads.dtype in DTYPES, f"the kernel takes float16 or bfloat16, not {heads.dtype}") & equal(
        heads.shape[-1], HEAD_SIZE, "head size of the kernel"
    )


def _part(value: Any, passed: list[fx.Node]) -> tuple[fx.Node | None, object]:
    """The call with several results that `value` views a result of, and which; what lies between goes to `passed`."""
    while isinstance(value, fx.Node) and str(value.target) in VIEWS:
        passed.append(value)
        value = value.args[0]
    if not isinstance(value, fx.Node) or value.target is not operator.getitem:
        return None, None
    passed.append(value)
    source, index = value.args
    assert isinstance(source, fx.Node)
    return source, index


def _legal(packed: Packed, attention: fx.Node) -> Fact:
    q, k, q_weight, k_weight, q_epsilon, k_epsilon, cos, sin = packed.fused.args
    query, key, value = (attention.kwargs[name].meta["val"] for name in ("query", "key", "value"))  # type: ignore[union-attr]
    q, k, cos, sin, q_weight, k_weight = (item.meta["val"] for item in (q, k, cos, sin, q_weight, k_weight))  # type: ignore[union-attr]
    dtypes = {item.dtype for item in (q, k, value, cos, sin, q_weight, k_weight)}
    return (
        takes(query)
        & known(len(dtypes) == 1, f"the dtypes {sorted(map(str, dtypes))} differ")
        & known(packed.qkv.meta["val"].dim() == 2, "the projection is not [tokens, columns]")
        & known(q_epsilon == k_epsilon, f"the norms' epsilons {q_epsilon} and {k_epsilon} differ")
        & equal(cos.shape[-1], HEAD_SIZE, "rotated part of the head")
        & known(cos.dim() == 3, f"cos has {cos.dim()} dimensions")
        & equal(cos.shape[0], query.shape[0], "cos along the tokens")
        & same_shape(query.shape, q.shape, "heads of the query")
        & same_shape(key.shape, k.shape, "heads of the key")
        & same_shape(key.shape, value.shape, "heads of key and value")
        & known(
            all(attention.kwargs[name] is None for name in ("output_scale", "kv_cache_dummy_dep")),
            "the attention quantises its output or follows a cache write of its own",
        )
    )


def _rewrite(graph: fx.Graph, attention: fx.Node, packed: Packed, record: PassRecord) -> None:
    _, _, q_weight, k_weight, epsilon, _, cos, sin = packed.fused.args
    record.fire(NAME, attention, [*packed.nodes, attention], Saving.between([packed.fused], []))
    with graph.inserting_before(attention):
        cos, sin = (
            call(graph, torch.ops.aten.squeeze.dim, (table, 1), replaces=[packed.fused], made_by=NAME)
            for table in (cos, sin)
        )
    names = ("layer_name", "_output_base_index", "_output_size", "_output_stride", "_output_storage_offset")
    kept = {name: attention.kwargs[name] for name in (*names, "_all_bases") if name in attention.kwargs}
    operands = {"q_weight": q_weight, "k_weight": k_weight, "epsilon": epsilon, "cos": cos, "sin": sin}
    target = torch.ops.npu_serving.qkv_attention.default
    with graph.inserting_before(attention):
        made = graph.create_node(
            "call_function", attention.target, (target,), {"qkv": packed.qkv, **operands, **kept}, "qkv_attention"
        )
    made.meta = {**origin_of([*packed.nodes, attention], NAME), "val": attention.meta["val"]}
    attention.replace_all_uses_with(made)
    graph.erase_node(attention)
    erase_unused(graph, dict.fromkeys(packed.nodes))


PASS = Pass(
    NAME, "behind the rule that joins norms and rotation, which it takes over", run, after="qk_norm_rope", local=True
)
