"""Blocks that the rules rewrite, as steps of random programs: each rule's example and near misses, and RoPE's forms."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from npu_compiler.passes import pipeline
from tests.passes.test_qk_norm_rope import arguments, hugging_face, vllm

HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Fragment:
    """A block and what it takes.

    Attributes:
        function: the block, in plain PyTorch.
        example: its arguments, given a dtype; those that are no tensors are the same in every use.
        oracle: what it means in float64 on the CPU, where `function` can't say it.
        dtypes: of the programs it can be part of.
        miss: whether it is a near miss, on which its rule must not fire.
    """

    name: str
    function: Callable[..., Any]
    example: Callable[[torch.dtype], Sequence[Any]]
    oracle: Callable[..., Any] | None
    dtypes: tuple[torch.dtype, ...]
    miss: bool = False

    def arguments(self, dtype: torch.dtype, seed: int) -> list[Tensor]:
        """The tensors of its example, equal for equal seeds."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return [item for item in self.example(dtype) if isinstance(item, Tensor)]

    def __call__(self, *tensors: Any) -> list[Any]:
        """Its results, from tensors or from fx's proxies of them (then it is one call of the traced program)."""
        if isinstance(tensors[0], fx.Proxy):
            called = tensors[0].tracer.create_proxy("call_function", self._callable, tensors, {})
            return [called[index] for index in range(self.results)]
        return self._callable(*tensors)

    def exact(self, *tensors: Tensor) -> list[Tensor]:
        """Its results by float64 arguments."""
        found = _tensors((self.oracle or self.function)(*self._all(tensors)))
        return [item.double() if item.is_floating_point() else item for item in found]

    @functools.cached_property
    def results(self) -> int:
        """How many tensors it makes."""
        return len(self._callable(*self.arguments(self.dtypes[0], 0)))

    @functools.cached_property
    def _callable(self) -> Callable[..., list[Tensor]]:
        def run(*tensors: Tensor) -> list[Tensor]:
            return _tensors(self.function(*self._all(tensors)))

        run.__name__ = run.__qualname__ = f"fragment_{self.name}"
        return run

    def _all(self, tensors: Sequence[Tensor]) -> list[Any]:
        given = iter(tensors)
        return [next(given) if tensor else constant for tensor, constant in self._constants]

    @functools.cached_property
    def _constants(self) -> list[tuple[bool, Any]]:
        example = self.example(self.dtypes[0])
        return [(isinstance(item, Tensor), None if isinstance(item, Tensor) else item) for item in example]


def _tensors(results: Any) -> list[Tensor]:
    return [item for item in tree_leaves(results) if isinstance(item, Tensor)]


def runs_here(function: Callable[..., Any]) -> bool:
    """Whether a program needs neither a group of processes nor vLLM's operators, whose import takes longer than many
    programs; tests/passes runs those."""
    names = str(function.__code__.co_names)
    return "vllm" not in names and "_c10d_functional" not in names


def _of_rules() -> dict[str, Fragment]:
    found = {}
    for rule in dict.fromkeys(rule for entry in pipeline.PASSES for rule in entry.rules):
        if not runs_here(rule.reference):
            continue
        found[rule.name] = Fragment(rule.name, rule.reference, rule.example, rule.oracle, rule.dtypes)
        if rule.oracle is None:
            for index, miss in enumerate(rule.near_misses):
                if not runs_here(miss.program) or _takes_scalars(miss.example or rule.example, rule.dtypes[0]):
                    continue
                name = f"{rule.name}_miss_{index}"
                found[name] = Fragment(name, miss.program, miss.example or rule.example, None, rule.dtypes, True)
    return found


def _takes_scalars(example: Callable[[torch.dtype], Sequence[Any]], dtype: torch.dtype) -> bool:
    """Whether an argument is a tensor without dimensions: rows are what programs vary."""
    return any(isinstance(item, Tensor) and not item.dim() for item in example(dtype))


def _rotations() -> dict[str, Fragment]:
    dtypes = (torch.float32, *HALVES)
    return {
        f"{name}_{form.__name__}": Fragment(
            f"{name}_{form.__name__}", form, functools.partial(arguments, form, normed), None, dtypes
        )
        for name, normed in (("rope", False), ("norm_rope", True))
        for form in (hugging_face, vllm)
    }


@functools.cache
def fragments() -> dict[str, Fragment]:
    """All of them, by name."""
    return {**_of_rules(), **_rotations()}


def expected_to_fire() -> set[str]:
    """What must fire in a run of many programs: every rule with a fragment, RoPE's operators, and the other passes."""
    rules = {rule.name for entry in pipeline.PASSES for rule in entry.rules if runs_here(rule.reference)}
    return rules | {"qk_rope", "qk_norm_rope"} | {"noop", "common", "dead_code", "reinplace"}
