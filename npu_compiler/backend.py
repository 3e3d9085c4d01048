"""torch.compile(model, backend="ascend").

    dynamo graph --lowering--> functional graph --passes--> fused graph --> captured per shape, replayed

`ascend` is the whole road. `compile_fx` stops before the capture: vLLM, which captures by itself, calls it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_flatten, tree_unflatten

import npu_compiler
from npu_compiler.config import Options, refuse_mode
from npu_compiler.graph import digest
from npu_compiler.lowering.functional import Functional, lower
from npu_compiler.passes import pipeline
from npu_compiler.passes.record import PassRecord

GraphHook = Callable[[fx.Graph], None]


class CompiledGraph:
    """What a dynamo graph became. Calling it does what the graph did.

    Attributes:
        name: a label for reports and dumps.
        options: the options it was compiled with.
        records: what each pass did, in order.
        graph: the program after the passes; None until it was lowered.
    """

    def __init__(self, name: str, options: Options) -> None:
        self.name = name
        self.options = options
        self.records: list[PassRecord] = []
        self.graph: fx.GraphModule | None = None
        self._call: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        assert self._call is not None, "only a finished CompiledGraph leaves this module"
        return self._call(*args)

    def __str__(self) -> str:
        return "\n".join([self.name, *(f"  {line}" for record in self.records for line in str(record).splitlines())])


def compile_fx(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Mapping[str, Any] | Options | None = None,
    *,
    before_lowering: GraphHook | None = None,
    after_passes: GraphHook | None = None,
    name: str = "graph",
) -> CompiledGraph:
    """Lowers `gm` and runs the passes; captures nothing.

    Args:
        gm: a dynamo graph (torch IR, as a torch.compile backend receives it). It is changed in place.
        example_inputs: what it will be called with: real or fake tensors, and sizes (int or SymInt).
        before_lowering: called with the dynamo graph; may rewrite it.
        after_passes: called with the functional graph after the passes and before writes go back in place.

    Returns:
        A callable with the graph's own convention, mutations and returned structure included.

    Raises:
        OptionError, TrainingError: see there.
    """
    chosen = Options.of(options)
    pipeline.selected(chosen)
    compiled = CompiledGraph(name, chosen)
    if before_lowering is not None:
        before_lowering(gm.graph)
        gm.recompile()

    def finish(functional: Functional) -> Callable[..., Any]:
        compiled.graph = functional.graph
        compiled.records = pipeline.run(functional.graph, chosen, after_rules=after_passes, dump_name=name)
        return functional.graph.forward

    unflatten = _return_flat_tuple(gm)
    call = lower(gm, example_inputs, finish)
    compiled._call = call if unflatten is None else lambda *args: unflatten(call(*args))
    return compiled


def fingerprint(options: Mapping[str, Any] | Options | None = None) -> str:
    """A hash of everything that decides what compile_fx makes of a graph: options, passes and their order, the
    compiler's own sources, and the versions of torch and torch_npu. Equal on every machine with the same set-up."""
    chosen = Options.of(options)
    package = Path(npu_compiler.__file__).parent
    folders = [package / "lowering", package / "graph", package / "facts", Path(pipeline.__file__).parent]
    decisive = {key: value for key, value in asdict(chosen).items() if key != "dump_dir"}
    return digest.of_text(sorted(decisive.items()), pipeline.names(), digest.versions(), digest.of_sources(folders))


def _return_flat_tuple(gm: fx.GraphModule) -> Callable[[Any], Any] | None:
    """Makes `gm` return a flat tuple, which AOTAutograd wants; returns how to get back what it returned."""
    output = gm.graph.output_node()
    (returned,) = output.args
    leaves, spec = tree_flatten(returned)
    if isinstance(returned, (list, tuple)) and all(not isinstance(item, (list, tuple, dict)) for item in returned):
        return None
    output.args = (tuple(leaves),)
    gm.recompile()
    return lambda flat: tree_unflatten(list(flat), spec)


_ids = itertools.count()


def ascend(
    gm: fx.GraphModule,
    example_inputs: Sequence[torch.Tensor],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend of torch.compile."""
    refuse_mode(mode)
    return compile_fx(gm, example_inputs, options, name=f"graph_{next(_ids)}")
