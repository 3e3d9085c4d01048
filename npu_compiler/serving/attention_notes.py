"""What a bundle keeps of attention, so that a served program can be run alone (alone.py).

Of each layer how it attends; and, where a step's inputs are asked for, the step's lengths, block tables and slots. What
its KV cache holds is kept only where all values are asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._library.fake_class_registry import FakeScriptObject
from torch._subclasses.fake_tensor import unset_fake_temporarily
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.utils.torch_utils import LayerName

from npu_compiler.serving.attention import BLOCK_SIZE, FRACTAL, NPUAttentionImpl, NPUAttentionMetadata

STEP_KEY = "npu_step"
"""Is in the forward context's additional_kwargs while a batch of requests is run, not one that vLLM made up."""


@dataclass(frozen=True)
class LayerNotes:
    """How a layer attends: as NPUAttentionImpl's attributes of these names. Sinks are weights: only that they are."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    window: int | None = None
    soft_cap: float | None = None
    slopes: list[float] | None = None
    sinks: bool = False
    cache_owner: str | None = None

    @classmethod
    def of(cls, impl: NPUAttentionImpl) -> LayerNotes:
        """Those of a layer of vLLM's."""
        extras = impl.extras
        return cls(
            num_heads=impl.num_heads,
            num_kv_heads=impl.num_kv_heads,
            head_size=impl.head_size,
            scale=impl.scale,
            window=extras.window,
            soft_cap=extras.soft_cap,
            slopes=None if extras.slopes is None else extras.slopes.tolist(),
            sinks=extras.sinks is not None,
            cache_owner=impl.cache_owner,
        )


@dataclass(frozen=True)
class StepNotes:
    """A step's batch, as NPUAttentionMetadata has it, on the host.

    Attributes:
        blocks: how many blocks of the cache it reaches; they are numbered anew, from 0.
        block_table: of each row the blocks that hold its tokens, no more.
    """

    num_tokens: int
    query_ends: list[int]
    kv_lengths: list[int]
    query_starts: list[int]
    lengths: list[int]
    block_table: list[list[int]]
    slots: list[int]
    blocks: int

    @classmethod
    def of(cls, step: NPUAttentionMetadata) -> tuple[StepNotes, list[int]]:
        """Those of a step, and the blocks that it reaches, in the order of their new numbers. Reads the device."""
        rows = zip(step.block_table.tolist(), step.kv_lengths, strict=False)
        table = [row[: -(-length // BLOCK_SIZE)] for row, length in rows]
        slots: list[int] = step.slot_mapping[: step.num_tokens].tolist()
        used = sorted({block for row in table for block in row} | {slot // BLOCK_SIZE for slot in slots})
        number = {block: index for index, block in enumerate(used)}
        notes = cls(
            num_tokens=step.num_tokens,
            query_ends=list(step.query_ends),
            kv_lengths=list(step.kv_lengths),
            query_starts=step.query_starts.tolist(),
            lengths=step.lengths.tolist(),
            block_table=[[number[block] for block in row] for row in table],
            slots=[number[slot // BLOCK_SIZE] * BLOCK_SIZE + slot % BLOCK_SIZE for slot in slots],
            blocks=len(used),
        )
        return notes, used


class AttentionNotes:
    """What the calls of a served program need besides their arguments (inspect.surroundings.Noted).

    Args:
        layers: vLLM's layers by name (its static forward context).
    """

    module = "npu_compiler.serving.alone"

    def __init__(self, layers: Mapping[str, Any]) -> None:
        self._layers = layers

    def inputs(self, values: Mapping[str, Any]) -> dict[str, str]:
        """The inputs that are names of layers."""
        found = {name: _layer_name(item) for name, item in values.items()}
        return {name: layer for name, layer in found.items() if layer is not None}

    def about(self, inputs: Mapping[str, str]) -> dict[str, Any]:
        """The attention layers among `inputs`, and those whose caches they read."""
        impls = {name: getattr(self._layers.get(name), "impl", None) for name in inputs.values()}
        with unset_fake_temporarily():  # the compiler works on fake values meanwhile
            found = {name: LayerNotes.of(impl) for name, impl in impls.items() if isinstance(impl, NPUAttentionImpl)}
            for owner in {notes.cache_owner for notes in found.values() if notes.cache_owner is not None}:
                found[owner] = LayerNotes.of(self._layers[owner].impl)
        return {"layers": {name: dataclasses.asdict(notes) for name, notes in found.items()}}

    def step(self, values: bool) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """The step that runs; None where vLLM runs a batch that it made up, to measure or to warm up."""
        context = get_forward_context() if is_forward_context_available() else None
        if context is None or STEP_KEY not in context.additional_kwargs:
            return None
        steps = context.attn_metadata.values() if isinstance(context.attn_metadata, dict) else ()
        step = next((entry for entry in steps if isinstance(entry, NPUAttentionMetadata)), None)
        if step is None:
            return None
        notes, used = StepNotes.of(step)
        caches = self._caches(used) if values else {}
        return dataclasses.asdict(notes), caches

    def _caches(self, used: Sequence[int]) -> dict[str, Tensor]:
        """What the blocks hold before the step, of each layer with a cache of its own."""
        found = {}
        for name, layer in self._layers.items():
            impl = getattr(layer, "impl", None)
            if isinstance(impl, NPUAttentionImpl) and impl.cache_owner is None and impl.fractal is not None:
                halves = impl._caches(layer.kv_cache, impl.fractal)
                found[name] = plain(halves, used, impl).cpu().contiguous()
        return found


def plain(halves: Iterable[Tensor], blocks: Sequence[int] | slice, layer: NPUAttentionImpl) -> Tensor:
    """Blocks of a layer's keys and values as [2, blocks, BLOCK_SIZE, kv heads, head size], whatever their order."""
    chosen = torch.stack([half[blocks] for half in halves])  # type: ignore[index]
    if layer.fractal:
        chosen = chosen.permute(0, 1, 3, 2, 4).flatten(3)
    return chosen.unflatten(-1, (layer.num_kv_heads, layer.head_size)) if layer.fractal else chosen


def ordered(whole: Tensor, fractal: bool) -> Tensor:
    """The inverse of `plain`, of all blocks."""
    if not fractal:
        return whole
    return whole.flatten(3).unflatten(3, (-1, FRACTAL)).permute(0, 1, 3, 2, 4).contiguous()


def _layer_name(item: Any) -> str | None:
    held = item.real_obj if isinstance(item, FakeScriptObject) else item
    return str(held.value) if isinstance(held, LayerName) else None
