"""Turns functional copies back into writes in place.

AOTAutograd makes `cache[i] = x` a call that gives a new cache, and wraps a custom operator that mutates (`op(x!, y)`)
as `auto_functionalized_v2(op, y, _all_bases=[x])`, which stands for clone, call, use the clone. This pass proves where
the copy is needless and puts the write back.

Before::

    out = aten.empty.memory_format([8, 64])
    pair = auto_functionalized_v2(attention_with_output, q, k, v, _output_base_index=0, _all_bases=[out])
    result = operator.getitem(pair, 1)
    row = aten.select_scatter.default(x, y, 0, 3)
    copy_ = aten.copy_.default(x, row)

After::

    out = aten.empty.memory_format([8, 64])
    attention_with_output(q, k, v, out)
    part = aten.select.int(x, 0, 3)
    copy_ = aten.copy_.default(part, y)

When a write in place would be noticed, graph/holders.py says. A call that reads what it writes through another argument
gets a copy to read, an output that would lie in an input's memory is a copy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.utils import detect_fake_mode

from npu_compiler.facts.sizes import equal, same_layout
from npu_compiler.graph.build import call
from npu_compiler.graph.effects import argument, is_functionalized, storage, tensors, value, written_storages
from npu_compiler.graph.functionalized import Base, Wrapped
from npu_compiler.graph.holders import Holders, is_final_write, same_place
from npu_compiler.graph.overlap import may_overlap
from npu_compiler.graph.source import operator_name, origin_of
from npu_compiler.graph.spec import infer, refresh_aliases
from npu_compiler.passes.record import PassRecord

NAME = "reinplace"
aten = torch.ops.aten
IN_PLACE: dict[Callable[..., Any], Callable[..., Any]] = {
    aten.index_put.default: aten.index_put_.default,
    aten.index_copy.default: aten.index_copy_.default,
    aten.index_add.default: aten.index_add_.default,
    aten.index_fill.int_Scalar: aten.index_fill_.int_Scalar,
    aten.scatter.src: aten.scatter_.src,
    aten.scatter.value: aten.scatter_.value,
    aten.scatter_add.default: aten.scatter_add_.default,
    aten.masked_fill.Scalar: aten.masked_fill_.Scalar,
    aten.masked_fill.Tensor: aten.masked_fill_.Tensor,
    aten.masked_scatter.default: aten.masked_scatter_.default,
    torch.ops._c10d_functional.all_reduce.default: torch.ops._c10d_functional.all_reduce_.default,
}
"""Operators that change their first argument's copy, and those of the same arguments that change it itself."""
UPDATES: dict[Callable[..., Any], Callable[..., Any]] = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.sub.Tensor: aten.sub_.Tensor,
    aten.mul.Tensor: aten.mul_.Tensor,
}
"""The same for arithmetic, which gains by it only where the program would copy its result back: a cache's count of its
tokens, `count += n`."""
VIEW_OF: dict[Callable[..., Any], Callable[..., Any]] = {
    aten.select_scatter.default: aten.select.int,
    aten.slice_scatter.default: aten.slice.Tensor,
    aten.as_strided_scatter.default: aten.as_strided.default,
    aten.diagonal_scatter.default: aten.diagonal.default,
}
"""`scatter(whole, part, *which)` is a copy of `whole` whose `view(*which)` is `part`."""


def run(module: fx.GraphModule, record: PassRecord) -> None:
    graph = module.graph
    if detect_fake_mode([node.meta.get("val") for node in graph.nodes]) is None:  # over sizes only: nothing is written
        return
    kept = _keep_outputs(graph)
    writes = _Writes(graph, record)
    for node in list(graph.nodes):
        if record.is_spent:
            break
        if is_functionalized(node):
            writes.wrapped(node)
        elif node.target in IN_PLACE or (node.target in UPDATES and _is_copied_back(node)):
            writes.operator(node)
        elif node.target in VIEW_OF and _outer(node) is None:
            writes.scatter(node)
    refresh_aliases(graph)
    _drop_final_writes(graph)
    _drop_needless(graph, kept, record)


def _is_copied_back(node: fx.Node) -> bool:
    """Whether a result is what its first argument, an input of the program, holds in the end."""
    return any(is_final_write(user) and list(user.args[:2]) == [node.args[0], node] for user in node.users)


class _Writes:
    """Puts functional writes in place, one after the other in the program's order."""

    def __init__(self, graph: fx.Graph, record: PassRecord) -> None:
        self._graph, self._record = graph, record
        self._holders = Holders(graph)

    def operator(self, node: fx.Node) -> None:
        """`new = index_put(old, ...)` becomes `index_put_(old, ...)`."""
        old = node.args[0]
        name = f"{NAME}: {operator_name(node.target)}"
        if not isinstance(old, fx.Node) or not self._may(name, node, old, value(old), [node]):
            return
        self._record.fire(name, node, [node])
        node.args = (old, *(self._separate(node, item, [value(old)]) for item in node.args[1:]))
        node.target = (IN_PLACE | UPDATES)[node.target]  # type: ignore[index]
        memory = _storages([node])
        node.meta["val"] = old.meta["val"]
        self._holders.become(memory, old)

    def scatter(self, node: fx.Node) -> None:
        """`new = select_scatter(old, part, 0, i)` becomes `copy_(select(old, 0, i), part)`, nested ones alike."""
        old, part, views = _unnested(node)
        name = f"{NAME}: {operator_name(node.target)}"
        added = _viewed(old, views, node)
        if not self._may(name, node, old, value(added[-1]), [node]):
            for view in reversed(added):
                self._graph.erase_node(view)
            return
        self._record.fire(name, node, [node])
        with self._graph.inserting_before(node):
            given = self._separate(node, part, [value(added[-1])])
            write = self._graph.call_function(aten.copy_.default, (added[-1], given))
            write.meta.update(origin_of([node], NAME), val=added[-1].meta["val"])
        node.replace_all_uses_with(old)
        memory = _storages([node])
        while node.target in VIEW_OF and not node.users:
            inner = node.args[1]
            self._graph.erase_node(node)
            if inner is part:
                break
            assert isinstance(inner, fx.Node)
            node = inner
        self._holders.become(memory, old)

    def wrapped(self, node: fx.Node) -> None:
        """`auto_functionalized_v2(op, ..., _all_bases=[old])` becomes `op(..., old)`, or `op(..., copy of old)`."""
        found = Wrapped.of(node)
        if found is None:
            self._record.refuse(NAME, node, f"{node.args[0]} is no operator, and stays functional")
            return
        name = f"{NAME}: {found.operator}"
        written: list[Base] = []
        for base in found.bases:
            after = found.values_after(base)
            if any(_one_memory(base.node, other.node) for other in written):
                self._record.refuse(
                    name, node, f"{base.node.name} is written through another argument too; it got a copy"
                )
            elif self._may(name, node, base.node, value(base.node), after, "; it got a copy"):
                written.append(base)
        copied = [base for base in found.bases if base not in written]
        copies = {base.path: self._copy(base.node, node) for base in copied}
        if None in copies.values():
            for copy in filter(None, copies.values()):
                self._graph.erase_node(copy)
            self._record.refuse(
                name, node, "a base with gaps and symbolic sizes can't be copied here; it stays functional"
            )
            return
        given = [value(base.node) for base in written]
        reads = found.reads
        kwargs = {key: self._separate(node, item, given) if key in reads else item for key, item in node.kwargs.items()}
        node.kwargs = kwargs
        instead = {base.path: base.node for base in written} | copies
        values = [(instead[base.path], _storages(found.values_after(base))) for base in found.bases]
        if not copied:
            self._record.fire(name, node, [node])
        self._holders.add(found.take_off(instead, NAME))  # type: ignore[arg-type]
        for old, memory in values:
            assert old is not None
            self._holders.become(memory, old)

    def _may(
        self, name: str, node: fx.Node, old: fx.Node, written: Any, new: Sequence[fx.Node], what_then: str = ""
    ) -> bool:
        why_not = self._holders.why_not(node, old, written, new)
        if why_not:
            self._record.refuse(name, node, f"{old.name}: {why_not}{what_then}")
        return not why_not

    def _separate(self, node: fx.Node, item: Any, written: Sequence[Any]) -> Any:
        """`item`, with copies for what is read from memory that the same call writes."""
        done: dict[fx.Node, fx.Node] = {}

        def separate(arg: fx.Node) -> fx.Node:
            if not any(_shares(tensor, other) for tensor in tensors(arg) for other in written):
                return arg
            if arg not in done:
                with self._graph.inserting_before(node):
                    done[arg] = call(self._graph, aten.clone.default, (arg,), replaces=[arg], made_by=NAME)
                self._record.refuse(
                    NAME, node, f"{arg.name} is read from memory that the same call writes; it got a copy"
                )
            return done[arg]

        return fx.node.map_arg(item, separate)

    def _copy(self, base: fx.Node, node: fx.Node) -> fx.Node | None:
        """A copy of `base` with its strides and offset; None where that takes arithmetic on symbolic sizes."""
        tensor = value(base)
        assert isinstance(tensor, Tensor)
        with self._graph.inserting_before(node):
            copy = call(self._graph, aten.clone.default, (base,), replaces=[node], made_by=NAME)
            if same_layout(tensor, value(copy), "a copy") and equal(tensor.storage_offset(), 0, "offset"):  # type: ignore[arg-type]
                return copy
            self._graph.erase_node(copy)
            layout = (tensor.shape, tensor.stride(), tensor.storage_offset())
            numbers = [*layout[0], *layout[1], layout[2]]
            if any(not isinstance(number, int) for number in numbers):
                return None
            reach = 1 + layout[2] + sum((size - 1) * stride for size, stride in zip(*layout[:2], strict=True))
            copy = base
            for target, args in (
                (aten.as_strided.default, ((reach,), (1,), 0)),
                (aten.clone.default, ()),
                (aten.as_strided.default, layout),
            ):
                copy = call(self._graph, target, (copy, *args), replaces=[node], made_by=NAME)
            return copy


def _one_memory(one: fx.Node, other: fx.Node) -> bool:
    return not {storage(tensor) for tensor in tensors(one)}.isdisjoint(storage(tensor) for tensor in tensors(other))


def _shares(one: Tensor, other: Any) -> bool:
    return storage(one) == storage(other) and may_overlap(one, other)


def _outer(node: fx.Node) -> fx.Node | None:
    """The scatter that puts the part that `node` has changed back where `node` took it from; None if there is none."""
    if len(node.users) != 1:
        return None
    (user,), view = node.users, node.args[0]
    if user.target not in VIEW_OF or user.args[1] is not node or not isinstance(view, fx.Node):
        return None
    same = view.target is VIEW_OF[user.target] and view.args[0] is user.args[0] and _which(view, 1) == _which(user, 2)  # type: ignore[index]
    return user if same else None


def _which(node: fx.Node, first: int) -> list[Any]:
    """The arguments that say which part a view or a scatter takes."""
    count = len(node.target._schema.arguments)  # type: ignore[union-attr]
    return [argument(node, index) for index in range(first, count)]


def _unnested(node: fx.Node) -> tuple[fx.Node, fx.Node, list[tuple[Any, list[Any]]]]:
    """The whole, the innermost part, and the views that lead from one to the other."""
    whole, part = node.args[0], node.args[1]
    assert isinstance(whole, fx.Node) and isinstance(part, fx.Node)
    views = [(VIEW_OF[node.target], _which(node, 2))]  # type: ignore[index]
    while part.target in VIEW_OF and _outer(part) is node:
        node, part = part, part.args[1]  # type: ignore[assignment]
        views.append((VIEW_OF[node.target], _which(node, 2)))  # type: ignore[index]
    return whole, part, views


def _viewed(whole: fx.Node, views: Iterable[tuple[Any, list[Any]]], node: fx.Node) -> list[fx.Node]:
    """The views of a whole, one through the other, in front of `node`."""
    added = [whole]
    for target, which in views:
        with node.graph.inserting_before(node):
            view = node.graph.call_function(target, (added[-1], *which))
        view.meta.update(origin_of([node], NAME))
        view.meta["val"] = infer(view)
        added.append(view)
    return added[1:]


def _drop_final_writes(graph: fx.Graph) -> None:
    """Drops the writes of an input's last value where it lies in the input already. Where it is another view of the
    input, it is copied before it is overwritten."""
    for node in list(graph.nodes):
        if not is_final_write(node):
            continue
        target, source = node.args[0], node.args[1]
        assert isinstance(target, fx.Node) and isinstance(source, fx.Node)
        if _storages([target]).isdisjoint(_storages([source])):
            continue
        if same_place(target, source):
            node.replace_all_uses_with(target)
            graph.erase_node(node)
        else:
            with graph.inserting_before(node):
                copy = call(graph, aten.clone.default, (source,), replaces=[node], made_by=NAME)
            node.args = (target, copy, *node.args[2:])


def _keep_outputs(graph: fx.Graph) -> list[fx.Node]:
    """Clones, where they are made, the outputs that a write in place may leave in an input's memory, which the program
    writes again at its end: `x[0] = 1; y = x.clone(); x[0] = 2; return y` must return neither x nor what x is then.

    Not where clones would not do: the caller gets several views of one memory, or one with gaps. Such an output holds
    what it views, and the writes that would be noticed stay functional (graph/holders.py)."""
    inputs = _storages(graph.find_nodes(op="placeholder"))
    written = _storages(node for node in graph.nodes if _may_be_in_place(node)) - inputs
    output = graph.output_node()
    returned = Counter(key for node in output.all_input_nodes for key in _storages([node]))
    copies: dict[fx.Node, fx.Node] = {}
    for node in output.all_input_nodes:
        memory = _storages([node])
        if memory & written and all(returned[key] == 1 for key in memory):
            with graph.inserting_after(node):
                copy = call(graph, aten.clone.default, (node,), replaces=[node], made_by=NAME)
            if same_layout(value(node), value(copy), "a copy"):  # type: ignore[arg-type]
                copies[node] = copy
            else:
                graph.erase_node(copy)
    output.args = fx.node.map_arg(output.args, lambda node: copies.get(node, node))
    return list(copies.values())


def _may_be_in_place(node: fx.Node) -> bool:
    return is_functionalized(node) or node.target in IN_PLACE or node.target in VIEW_OF


def _storages(nodes: Iterable[fx.Node]) -> set[int]:
    return {storage(tensor) for node in nodes for tensor in tensors(node)}


def _drop_needless(graph: fx.Graph, copies: Iterable[fx.Node], record: PassRecord) -> None:
    """Drops those of `_keep_outputs`'s clones whose source is the program's own, is not written any more, and shares
    memory with no other output."""
    inputs, output = _storages(graph.find_nodes(op="placeholder")), graph.output_node()
    for copy in copies:
        source = copy.args[0]
        assert isinstance(source, fx.Node)
        shared = _storages([source])
        taken = inputs | _storages(node for node in output.all_input_nodes if node is not copy)
        if shared & taken or any(written_storages(node) & shared for node in _behind(copy)):
            text = "an output became an input's memory or another's, or is written again; it got a copy"
            record.refuse(NAME, source, text)
        else:
            copy.replace_all_uses_with(source)
            graph.erase_node(copy)


def _behind(node: fx.Node) -> Iterator[fx.Node]:
    while node.next.op != "root":
        node = node.next
        yield node
