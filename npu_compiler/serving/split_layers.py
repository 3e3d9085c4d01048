"""vLLM's layers on a part of weights that data-parallel engines split (fine_grained_tp.py). Imported once a process.

Of n engines with as many rows each, the rows of all go to each part of a weight, and what belongs to an engine's own
rows comes back:

    embedding           ids gathered; rows that the part has not are zeros; the sums scattered by rows
    o_proj              columns of all rows exchanged; product; the sums scattered by rows
    gate_up_proj        rows gathered; product; down_proj goes on with these rows: product; the sums scattered by rows
    lm_head             rows gathered; product; columns of the own rows exchanged

Where nothing is split, a layer is vLLM's own. The collectives are calls of the graph that is traced; those of the LM
head, which vLLM computes behind it, run by themselves.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.distributed import GroupCoordinator
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
    pad_vocab_size,
)

from npu_compiler.errors import UnservedError
from npu_compiler.inspect.run import SplitWeights
from npu_compiler.serving.fine_grained_tp import group_of
from npu_compiler.serving.places import here

_GATE_UP, _DOWN = re.compile(r"(.*\.|^)mlp\.gate_up_proj$"), re.compile(r"(.*\.|^)mlp\.down_proj$")
"""Of an MLP in the place of experts; shared experts are deeper, `mlp.shared_experts.down_proj`."""
_O_PROJ = re.compile(r"(.*\.|^)o_proj$")


class _ByVocabulary(VocabParallelEmbedding):
    """Rows of the vocabulary over a group of engines."""

    kind: str

    def __init__(self, num_embeddings: int, embedding_dim: int, *rest: Any, **named: Any) -> None:
        """Raises UnservedError where the vocabulary can't be split evenly or is quantised."""
        group = None if named.get("disable_tp") or named.get("parallel_group") else group_of(self.kind)
        if group is not None:
            given = _arguments(VocabParallelEmbedding, num_embeddings, embedding_dim, *rest, **named)
            whole = pad_vocab_size(given["org_num_embeddings"] or num_embeddings, given["padding_size"])
            _check_size(self.kind, given["prefix"], "rows of the vocabulary", whole, group)
            named["parallel_group"] = group
        super().__init__(num_embeddings, embedding_dim, *rest, **named)
        self.split_over = group
        if group is not None:
            _refuse_quantised(self, self.kind)


@VocabParallelEmbedding.register_oot
class NPUVocabParallelEmbedding(_ByVocabulary):
    """The embedding; also of the logits, where a model has one weight for both."""

    kind = "embedding"

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        if self.split_over is not None:
            self.reduce_results = False

    def forward(self, input_: Tensor) -> Tensor:
        """Token ids [rows] of this engine to [rows, hidden]."""
        group = self.split_over
        if group is None:
            return super().forward(input_)
        return group.reduce_scatter(super().forward(group.all_gather(input_, dim=0)), dim=0)


@ParallelLMHead.register_oot
class NPUParallelLMHead(ParallelLMHead, _ByVocabulary):
    """The LM head; NPULogitsProcessor computes with it."""

    kind = "lm_head"


@LogitsProcessor.register_oot
class NPULogitsProcessor(LogitsProcessor):
    """Logits by a head that is split over engines, of as many rows on each.

    Attributes:
        rows: how many rows the engines bring in this step. An engine that samples fewer has zeros in the others.
    """

    rows: int = 0

    def _get_logits(
        self,
        hidden_states: Tensor,
        lm_head: VocabParallelEmbedding,
        embedding_bias: Tensor | None,
        skip_gather: bool = False,
    ) -> Tensor | None:
        """hidden_states [count, hidden] of this engine to [count, vocabulary].

        Raises:
            UnservedError: `count` is more than the engines bring in this step.
        """
        group = getattr(lm_head, "split_over", None)
        if group is None:
            return super()._get_logits(hidden_states, lm_head, embedding_bias, skip_gather)
        count = hidden_states.shape[0]
        if count > self.rows:
            raise UnservedError(
                f"{count} rows of logits are asked for in a step in which engines compute {self.rows} each",
                where=here(lm_head.prefix),
                rule="the LM head is split over data-parallel engines (fine_grained_tp), which come to it once a step, "
                "with one row a request",
                fix="leave lm_head out of fine_grained_tp",
            )
        rows = functional.pad(hidden_states, (0, 0, 0, self.rows - count))
        logits = self._apply_head(lm_head, group.all_gather(rows, dim=0), embedding_bias)
        parts = exchanged(logits, self.rows, group).view(group.world_size, self.rows, -1)
        return parts[:, :count].transpose(0, 1).flatten(1)[:, : self.org_vocab_size]


@MergedColumnParallelLinear.register_oot
class NPUMergedColumnParallelLinear(MergedColumnParallelLinear):
    """gate_up_proj of an MLP that is split over engines: makes columns for the rows of all."""

    split_over: GroupCoordinator | None = None

    def __init__(self, input_size: int, output_sizes: list[int], *rest: Any, **named: Any) -> None:
        """Raises UnservedError where the sizes don't divide or the layer is quantised."""
        given = _arguments(MergedColumnParallelLinear, input_size, output_sizes, *rest, **named)
        group = group_of("mlp") if _GATE_UP.match(given["prefix"]) else None
        if group is None:
            super().__init__(input_size, output_sizes, *rest, **named)
            return
        for size in output_sizes:
            _check_size("mlp", given["prefix"], "columns", size, group)
        # Made of its part's sizes; loaded, by its number in the group, from weights of the whole ones.
        super().__init__(input_size, [size // group.world_size for size in output_sizes], *rest, **named)
        self.output_sizes = output_sizes
        _join(self, group, "mlp")

    def forward(self, input_: Tensor) -> Any:
        """Rows [rows, in] of this engine to columns [engines * rows, out / engines] of all rows."""
        return super().forward(input_ if self.split_over is None else self.split_over.all_gather(input_, dim=0))


@RowParallelLinear.register_oot
class NPURowParallelLinear(RowParallelLinear):
    """o_proj, or down_proj of an MLP, that is split over engines."""

    split_over: GroupCoordinator | None = None
    _gathered = False  # whether what comes is of all rows already

    def __init__(self, input_size: int, output_size: int, *rest: Any, **named: Any) -> None:
        """Raises UnservedError where the sizes don't divide or the layer is quantised."""
        given = _arguments(RowParallelLinear, input_size, output_size, *rest, **named)
        kind = "o_proj" if _O_PROJ.match(given["prefix"]) else "mlp" if _DOWN.match(given["prefix"]) else ""
        group = group_of(kind)
        if group is None:
            super().__init__(input_size, output_size, *rest, **named)
            return
        _check_size(kind, given["prefix"], "columns", input_size, group)
        super().__init__(input_size // group.world_size, output_size, *rest, **named)
        self.input_size, self.reduce_results, self._gathered = input_size, False, kind == "mlp"
        _join(self, group, kind)

    def forward(self, input_: Tensor) -> Any:
        """[rows, in] of this engine, or behind gate_up_proj [engines * rows, in / engines] of all, to [rows, out]."""
        group = self.split_over
        if group is None:
            return super().forward(input_)
        found = super().forward(input_ if self._gathered else columns_exchanged(input_, group))
        total, *bias = found if self.return_bias else (found,)
        total = group.reduce_scatter(total, dim=0)
        return (total, *bias) if self.return_bias else total


def columns_exchanged(rows: Tensor, group: GroupCoordinator) -> Tensor:
    """Rows [rows, columns] of this engine for [engines * rows, columns / engines]: this rank's columns of all rows."""
    (count, columns), ranks = rows.shape, group.world_size
    parts = rows.view(count, ranks, columns // ranks).transpose(0, 1).reshape(ranks * count, columns // ranks)
    return exchanged(parts, count, group)


def exchanged(rows: Tensor, each: int, group: GroupCoordinator) -> Tensor:
    """Sends rows [engines * each, ...], `each` of them to every engine in order; those that come from the engines."""
    sizes = [each] * group.world_size
    sent = torch.ops._c10d_functional.all_to_all_single(rows.contiguous(), sizes, sizes, group.unique_name)
    return torch.ops._c10d_functional.wait_tensor(sent)


def _join(layer: Any, group: GroupCoordinator, kind: str) -> None:
    """Makes a linear layer of its part's sizes one of the group's: its weights are then loaded by its number there."""
    _refuse_quantised(layer, kind)
    layer.split_over, layer.tp_rank, layer.tp_size = group, group.rank_in_group, group.world_size
    layer.update_param_tp_status()


def _refuse_quantised(layer: Any, kind: str) -> None:
    if not isinstance(layer.quant_method, (UnquantizedEmbeddingMethod, UnquantizedLinearMethod)):
        raise UnservedError(
            f"quantised weights of the kind {kind} can't be split over engines",
            where=here(layer.prefix),
            rule="only weights that are not quantised are split (fine_grained_tp): their scales would have to be, too",
            fix=f"leave {kind} out of fine_grained_tp, or serve the model without quantisation",
        )


def _check_size(kind: str, prefix: str, what: str, size: int, group: GroupCoordinator) -> None:
    if size % group.world_size:
        raise UnservedError(
            f"{size} {what} can't be split over {group.world_size} engines",
            where=here(prefix),
            rule=f"each engine has as many ({what} of the kind {kind}, fine_grained_tp)",
            fix=f"give {kind} a number that divides {size}, or leave it out",
        )


def _arguments(layer: type[nn.Module], *given: Any, **named: Any) -> dict[str, Any]:
    """What a layer of vLLM's is made of, by name."""
    bound = inspect.signature(layer.__init__).bind(None, *given, **named)
    bound.apply_defaults()
    return bound.arguments


def split_weights(model: nn.Module, kinds: Iterable[str]) -> list[SplitWeights]:
    """What a model has of weights that are split.

    Args:
        kinds: that have to be.

    Raises:
        UnservedError: the model has no layer of a kind, or one half of an MLP only.
    """
    layers: dict[str, list[tuple[str, Any]]] = {kind: [] for kind in kinds}
    for name, layer in model.named_modules():
        if getattr(layer, "split_over", None) is not None:
            layers[_kind(layer)].append((name, layer))
    if layers.get("embedding") and not any(isinstance(layer, ParallelLMHead) for layer in model.modules()):
        layers.pop("lm_head", None)  # the embedding is the head, too: fine_grained_tp.settle has them split alike
    for kind, found in layers.items():
        _check_found(kind, [name for name, _ in found])
    seen: set[int] = set()
    return [_weights(kind, [layer for _, layer in found], seen) for kind, found in layers.items()]


def _kind(layer: Any) -> str:
    if isinstance(layer, _ByVocabulary):
        return layer.kind
    return "mlp" if isinstance(layer, NPUMergedColumnParallelLinear) or layer._gathered else "o_proj"


def _check_found(kind: str, names: list[str]) -> None:
    if not names:
        raise UnservedError(
            f"the model has no layer of the kind {kind} that could be split",
            where="the model",
            rule="fine_grained_tp splits vLLM's VocabParallelEmbedding, ParallelLMHead, RowParallelLinear where it is "
            "called o_proj, and mlp.gate_up_proj with mlp.down_proj in layers without experts",
            fix=f"leave {kind} out of fine_grained_tp",
        )
    halves = {name.rpartition(".")[0] for name in names if kind == "mlp"}
    lone = sorted(half for half in halves if not {f"{half}.gate_up_proj", f"{half}.down_proj"} <= set(names))
    if lone:
        raise UnservedError(
            "one half of an MLP alone can't be split over engines",
            where=lone[0],
            rule="gate_up_proj gathers the rows that down_proj scatters (fine_grained_tp)",
            fix="leave mlp out of fine_grained_tp",
        )


def _weights(kind: str, layers: list[Any], seen: set[int]) -> SplitWeights:
    """Of layers of one kind; what is in `seen` already, a weight that is tied to another, is not counted again."""
    engines = layers[0].split_over.world_size
    found = []
    for layer in layers:
        for name, parameter in layer.named_parameters(recurse=False):
            parted = not (isinstance(layer, RowParallelLinear) and name == "bias")
            if parted and id(parameter) not in seen:
                seen.add(id(parameter))
                found.append(parameter.nbytes)
    return SplitWeights(kind=kind, engines=engines, weights=len(found), here=sum(found), whole=engines * sum(found))
