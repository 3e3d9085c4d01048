"""A served program run alone, without vLLM's engine and without the model: what `npu-compiler replay` needs for it.

Attention runs as it does in serving, by its own operators, in a forward context that holds the step which the bundle
kept, or one that is made up; its KV caches hold saved values, or made-up ones. What it means is written down here once
more, in float64. Importing this registers the operators that served programs call.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import vllm.ir.ops
import vllm.model_executor.layers.attention.attention  # noqa: F401  # registers its operators
from pydantic import TypeAdapter
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from vllm.forward_context import ForwardContext, override_forward_context
from vllm.ir.op import IrOp
from vllm.utils.torch_utils import LayerName

from npu_compiler.errors import BundleError
from npu_compiler.serving import qkv_attention
from npu_compiler.serving.attention import BLOCK_SIZE, MASK_SIZE, NPUAttentionImpl, NPUAttentionMetadata
from npu_compiler.serving.attention_notes import LayerNotes, StepNotes, ordered, plain
from npu_compiler.serving.plain_attention import Extras

qkv_attention.register()
ATTENTION = torch.ops.vllm.unified_attention_with_output.default
PACKED = torch.ops.npu_serving.qkv_attention.default
DECODES = 8
"""How many requests of a made-up step decode, at most; what is left is one chunk of a prompt."""
LONGEST = 300
"""Tokens: how long the texts of a made-up step are, at most, before it."""
TURNED = 7
"""By how many elements saved caches are turned from one call to the next."""
_LAYERS, _STEP = TypeAdapter(dict[str, LayerNotes]), TypeAdapter(StepNotes)


class _Stored(Protocol):
    """What the bundle holds (inspect.contents.Surroundings)."""

    inputs: dict[str, str]
    about: dict[str, Any]
    step: dict[str, Any] | None


def restored(stored: _Stored, caches: Mapping[str, Tensor]) -> Alone:
    """The attention of a dumped program.

    Args:
        caches: what the KV caches held before the step, by layer; made up where it is missing.
    """
    layers = _LAYERS.validate_python(stored.about["layers"])
    step = None if stored.step is None else _STEP.validate_python(stored.step)
    return Alone(stored.inputs, layers, step, caches)


def made_up_step(tokens: int) -> StepNotes:
    """A batch of `tokens` tokens: up to DECODES requests decode one each, another brings the rest of its prompt. Each
    has up to LONGEST tokens in the cache, in blocks that lie in no order."""
    numbers = random.Random(tokens)
    queries = [1] * tokens if tokens <= DECODES else [1] * (DECODES - 1) + [tokens - DECODES + 1]
    lengths = [count + numbers.randint(0, LONGEST) for count in queries]
    ends = list(itertools.accumulate(queries))
    sizes = [-(-length // BLOCK_SIZE) for length in lengths]
    free = list(range(sum(sizes)))
    numbers.shuffle(free)
    table = [[free.pop() for _ in range(size)] for size in sizes]
    slots = [
        row[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        for row, count, length in zip(table, queries, lengths, strict=True)
        for position in range(length - count, length)
    ]
    return StepNotes(tokens, ends, lengths, [0, *ends], lengths, table, slots, sum(sizes))


class Alone:
    """The attention of one program (inspect.surroundings.Restored).

    Attributes:
        objects: the inputs that name a layer.
    """

    def __init__(
        self,
        inputs: Mapping[str, str],
        layers: Mapping[str, LayerNotes],
        step: StepNotes | None,
        caches: Mapping[str, Tensor],
    ) -> None:
        self.objects = {name: LayerName(layer) for name, layer in inputs.items()}
        self.layers = layers
        self._step, self._caches = step, caches
        self._tokens = 1
        self._called: set[str] = set()
        self.dtype = torch.float32

    def fit(self, calls: Iterable[tuple[Any, Mapping[str, Any]]]) -> None:
        """Is told which program it is for: a made-up step has as many tokens as its attention, caches have its dtype.

        Args:
            calls: the program's operators and their arguments, fake values among them.

        Raises:
            BundleError: a call reads a layer of the model that is no attention.
        """
        for operator, arguments in calls:
            for name in (item.value for item in arguments.values() if isinstance(item, LayerName)):
                if name not in self.layers:
                    raise BundleError(
                        f"{operator} reads {name} from the model itself",
                        where=name,
                        rule="a bundle holds what attention needs; weights of other layers are in the model",
                        fix="look at the graphs that are free of such calls",
                    )
                self._called.add(name)
            query = {ATTENTION: "query", PACKED: "qkv"}.get(operator)
            if query is not None:
                value = arguments[query]
                size = value.shape[0]
                self._tokens = size if isinstance(size, int) else int(size.node.hint)
                self.dtype = value.dtype

    @property
    def step(self) -> StepNotes:
        """The step that is replayed."""
        return made_up_step(self._tokens) if self._step is None else self._step

    def cache(self, layer: str, turn: int) -> Tensor:
        """What a layer's cache holds before a call: [2, blocks, BLOCK_SIZE, kv heads, head size] on the host."""
        notes, seed = self.layers[layer], list(self.layers).index(layer)
        if layer in self._caches and self._step is not None:
            kept = self._caches[layer]
            return kept.flatten().roll(TURNED * turn).view_as(kept)
        shape = (2, self.step.blocks, BLOCK_SIZE, notes.num_kv_heads, notes.head_size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * turn + seed)).to(self.dtype)

    def sinks(self, layer: str) -> Tensor | None:
        """A layer's made-up sinks [heads] on the host."""
        notes = self.layers[layer]
        return torch.linspace(-1, 1, notes.num_heads) if notes.sinks else None

    def owners(self) -> list[str]:
        """The layers whose caches the program reads."""
        return list(dict.fromkeys(self.layers[name].cache_owner or name for name in sorted(self._called)))

    def on_device(self) -> OnDevice:
        """Serving's own attention."""
        return OnDevice(self)

    def in_float64(self) -> InFloat64:
        """What it means."""
        return InFloat64(self)


class _Impl(NPUAttentionImpl):
    """Serving's attention on a cache that is filled before each call, in the order the layer's first call chose."""

    def __init__(self, name: str, notes: LayerNotes, alone: Alone) -> None:
        sinks = alone.sinks(name)
        self.extras = Extras(
            window=notes.window,
            soft_cap=notes.soft_cap,
            slopes=None if notes.slopes is None else torch.tensor(notes.slopes).npu(),
            sinks=None if sinks is None else sinks.to(alone.dtype).npu(),
        )
        self.num_heads, self.num_kv_heads, self.head_size = notes.num_heads, notes.num_kv_heads, notes.head_size
        self.scale, self.cache_owner, self.kv_cache_dtype = notes.scale, notes.cache_owner, "auto"
        self.fractal: bool | None = False if self.extras else None
        self.cache: _Cache = _Cache()

    def _caches(self, kv_cache: Tensor, fractal: bool) -> tuple[Tensor, Tensor]:
        return self.cache.halves(fractal)


@dataclass
class _Cache:
    """A layer's keys and values on the device; `before`: as they are before a call, on the host."""

    before: Tensor | None = None
    now: Tensor | None = None

    def halves(self, fractal: bool) -> tuple[Tensor, Tensor]:
        assert self.before is not None, "a cache is read inside of a turn only"
        if self.now is None:
            self.now = ordered(self.before, fractal).npu()
        return self.now[0], self.now[1]


@dataclass(frozen=True)
class _Layer:
    """What vLLM's operators want of a layer."""

    layer_name: str
    impl: _Impl
    kv_cache: Tensor


class OnDevice:
    """Serving's attention in a forward context of its own (inspect.surroundings.Run)."""

    def __init__(self, alone: Alone) -> None:
        self.meanings: Mapping[Any, Callable[..., Any]] = {}
        self._alone = alone
        impls = {name: _Impl(name, notes, alone) for name, notes in alone.layers.items()}
        for impl in impls.values():
            if impl.cache_owner is not None:
                impl.cache = impls[impl.cache_owner].cache
        nowhere = torch.empty(0)
        self._layers = {name: _Layer(name, impl, nowhere) for name, impl in impls.items()}
        self._metadata = metadata_of(alone.step)

    @contextlib.contextmanager
    def turn(self, index: int) -> Iterator[None]:
        """See inspect.surroundings.Run."""
        for name in self._alone.owners():
            cache = self._layers[name].impl.cache
            cache.before, cache.now = self._alone.cache(name, index), None
        context = ForwardContext(
            no_compile_layers=self._layers,
            attn_metadata=dict.fromkeys(self._layers, self._metadata),
            slot_mapping=dict.fromkeys(self._layers, self._metadata.slot_mapping),
        )
        with override_forward_context(context):
            yield

    def left(self) -> dict[str, Tensor]:
        """See inspect.surroundings.Run."""
        found = {}
        for name in self._alone.owners():
            impl = self._layers[name].impl
            if impl.cache.now is not None:
                now = plain(impl.cache.now, slice(None), impl).cpu()
                if not torch.equal(now, impl.cache.before):  # type: ignore[arg-type]
                    found[_called(name)] = now
        return found


def metadata_of(step: StepNotes) -> NPUAttentionMetadata:
    """A step as serving's attention takes it, on the device."""
    width = max(map(len, step.block_table), default=1)
    table = [[*row, *[0] * (width - len(row))] for row in step.block_table]
    return NPUAttentionMetadata(
        num_tokens=step.num_tokens,
        query_ends=step.query_ends,
        kv_lengths=step.kv_lengths,
        block_table=torch.tensor(table, dtype=torch.int32).npu(),
        slot_mapping=torch.tensor(step.slots, dtype=torch.int64).npu(),
        mask=torch.triu(torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.bool), diagonal=1).npu(),
        query_starts=torch.tensor(step.query_starts, dtype=torch.int32).npu(),
        lengths=torch.tensor(step.lengths, dtype=torch.int32).npu(),
    )


class InFloat64:
    """What attention and vLLM's IR operators mean (inspect.surroundings.Run): on the host, on float64."""

    def __init__(self, alone: Alone) -> None:
        self._alone = alone
        self._before: dict[str, Tensor] = {}
        self._now: dict[str, Tensor] = {}
        self.meanings: Mapping[Any, Callable[..., Any]] = {
            **{entry.torch_op: widely(entry.impls["native"].impl_fn) for entry in IrOp.registry.values()},
            ATTENTION: self._attend,
        }

    @contextlib.contextmanager
    def turn(self, index: int) -> Iterator[None]:
        """See inspect.surroundings.Run."""
        self._before = {name: self._alone.cache(name, index).double() for name in self._alone.owners()}
        self._now = {name: cache.clone() for name, cache in self._before.items()}
        yield

    def left(self) -> dict[str, Tensor]:
        """See inspect.surroundings.Run."""
        return {
            _called(name): now.clone() for name, now in self._now.items() if not torch.equal(now, self._before[name])
        }

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, output: Tensor, layer_name: LayerName, *rest: Any, **more: Any
    ) -> None:
        """vllm.unified_attention_with_output: writes keys and values to the cache, and `output`."""
        name = layer_name.value
        notes, step = self._alone.layers[name], self._alone.step
        cache = self._now[notes.cache_owner or name]
        if notes.cache_owner is None:
            flat, slots = cache.view(2, -1, *cache.shape[3:]), torch.tensor(step.slots)
            flat[0, slots], flat[1, slots] = key[: step.num_tokens], value[: step.num_tokens]
        starts = [0, *step.query_ends]
        rows = zip(itertools.pairwise(starts), step.kv_lengths, step.block_table, strict=False)
        for (start, end), length, blocks in rows:
            if end > start:
                keys, values = cache[:, blocks].flatten(1, 2)[:, :length]
                output[start:end] = _attended(query[start:end], keys, values, notes, self._alone.sinks(name))


def _attended(query: Tensor, keys: Tensor, values: Tensor, notes: LayerNotes, sinks: Tensor | None) -> Tensor:
    """One request. query [tokens, heads, head size], its last tokens; keys, values [length, kv heads, head size]."""
    tokens, length = query.shape[0], keys.shape[0]
    shared = notes.num_heads // notes.num_kv_heads
    keys, values = (item.repeat_interleave(shared, dim=1) for item in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query, keys) * notes.scale
    if notes.soft_cap is not None:
        scores = notes.soft_cap * torch.tanh(scores / notes.soft_cap)
    behind = torch.arange(length - tokens, length)[:, None] - torch.arange(length)
    if notes.slopes is not None:
        scores = scores - torch.tensor(notes.slopes, dtype=torch.float64)[:, None, None] * behind
    seen = behind >= 0
    if notes.window is not None:
        seen = seen & (behind < notes.window)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        column = sinks.double()[:, None, None].expand(-1, tokens, 1)
        weights = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


def widely(meaning: Callable[..., Any]) -> Callable[..., Any]:
    """A function of torch's, whose conversions to other floating dtypes keep float64."""

    def wide(*args: Any, **kwargs: Any) -> Any:
        with _Wide():
            return meaning(*args, **kwargs)

    return wide


class _Wide(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_widened, (args, kwargs or {}))
        return func(*args, **kwargs)


def _widened(item: Any) -> Any:
    return torch.float64 if isinstance(item, torch.dtype) and item.is_floating_point else item


def _called(layer: str) -> str:
    return f"KV cache of {layer}"
