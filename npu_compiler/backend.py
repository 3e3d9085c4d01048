"""torch.compile(model, backend="ascend").

    dynamo graph --lowering--> functional graph --passes--> fused graph --> captured per shape, replayed

`ascend` is the whole road. `compile_fx` stops before the capture: vLLM, which captures by itself, calls it.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_flatten, tree_unflatten

import npu_compiler
from npu_compiler.aclgraph import npugraph_ex
from npu_compiler.aclgraph.ledger import Ledger
from npu_compiler.aclgraph.replay import Replayer
from npu_compiler.config import Options, refuse_mode
from npu_compiler.fusion_kernels.chosen import providers
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
        graph: the program after the passes; None where gradients are needed: it is neither rewritten nor captured.
        ledger: captures and replays; None where nothing is captured (compile_fx).
    """

    def __init__(self, name: str, options: Options) -> None:
        self.name = name
        self.options = options
        self.records: list[PassRecord] = []
        self.graph: fx.GraphModule | None = None
        self.ledger: Ledger | None = None
        self._call: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        assert self._call is not None, "only a finished CompiledGraph leaves this module"
        return self._call(*args)

    def __str__(self) -> str:
        operators = providers(self.graph.graph) if self.graph else []
        parts: list[object] = [*self.records, *operators, *([self.ledger] if self.ledger else [])]
        if self.graph is None:
            parts.append("gradients are needed: no passes, no captures")
        elif self.options.capture_with != "ascend":
            parts.append(f"captured by {self.options.capture_with}, which keeps no ledger")
        return "\n".join([self.name, *(f"  {line}" for part in parts for line in str(part).splitlines())])


class AscendBackend:
    """The backend behind the name "ascend". It remembers, weakly, what it compiled, for `report`."""

    def __init__(self) -> None:
        self._compiled: weakref.WeakSet[CompiledGraph] = weakref.WeakSet()
        self._count = itertools.count()
        self.__name__ = "ascend"  # what dynamo's messages call it

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[torch.Tensor],
        *,
        options: Mapping[str, Any] | None = None,
        mode: str | None = None,
    ) -> CompiledGraph:
        """What torch.compile calls: lower, run the passes, serve calls by captured graphs."""
        refuse_mode(mode)
        chosen = Options.of(options)
        compiled = CompiledGraph(f"graph_{next(self._count)}", chosen)
        names = [_input_name(node) for node in gm.graph.find_nodes(op="placeholder")]

        def serve(functional: Functional) -> Callable[..., Any]:
            if chosen.capture_with == "npugraph_ex":
                return npugraph_ex.serve(functional.graph, functional.inputs, functional.stable, chosen.npugraph_ex)
            replayer = Replayer(functional.graph, functional.stable, chosen, compiled.name, names)
            compiled.ledger = replayer.ledger
            return replayer

        _compile(compiled, gm, example_inputs, serve)
        self._compiled.add(compiled)
        return compiled

    def compiled(self) -> list[CompiledGraph]:
        """The compiled graphs that are alive, oldest first."""
        return sorted(self._compiled, key=lambda entry: int(entry.name.removeprefix("graph_")))


ascend = AscendBackend()


def report() -> str:
    """What became of the graphs torch.compile(backend="ascend") has compiled in this process and that are alive: each
    pass with what it did and left out and why, each capture with its price, the count of replays."""
    return "\n".join(str(entry) for entry in ascend.compiled()) or "nothing compiled"


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
        A callable with the graph's own convention, mutations and returned structure included (a flat tuple comes back
        as a list, as from every compiler of torch.compile).

    Raises:
        OptionError: see there.
    """
    compiled = CompiledGraph(name, Options.of(options))
    if before_lowering is not None:
        before_lowering(gm.graph)
        gm.recompile()
    return _compile(compiled, gm, example_inputs, lambda functional: functional.graph.forward, after_passes)


def _compile(
    compiled: CompiledGraph,
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    serve: Callable[[Functional], Callable[..., Any]],
    after_passes: GraphHook | None = None,
) -> CompiledGraph:
    """The common road: lowering, passes, then whatever serves the calls."""
    pipeline.selected(compiled.options)  # a wrong pass name is refused before the work starts

    def finish(functional: Functional) -> Callable[..., Any]:
        compiled.graph = functional.graph
        compiled.records = pipeline.run(
            functional.graph, compiled.options, after_rules=after_passes, dump_name=compiled.name
        )
        return serve(functional)

    unflatten = _return_flat_tuple(gm)
    call = lower(gm, example_inputs, finish)
    compiled._call = call if unflatten is None else lambda *args: unflatten(call(*args))
    return compiled


def fingerprint(options: Mapping[str, Any] | Options | None = None) -> str:
    """A hash of everything that decides what compile_fx makes of a graph: options, passes and their order, the content
    of the user's own rules and passes, the compiler's own sources, and the versions of Python, torch and torch_npu.
    Equal on every machine with the same set-up.

    Raises:
        OptionError: an option is wrong, or a user's rule or pass can't be hashed.
    """
    chosen = Options.of(options)
    package = Path(npu_compiler.__file__).parent
    folders = [package / "lowering", package / "graph", package / "facts", Path(pipeline.__file__).parent]
    elsewhere = ("dump_dir", "check", "rules", "passes", "disabled_passes", "disabled_rules")  # in pipeline.fingerprint
    decisive = {entry.name: getattr(chosen, entry.name) for entry in fields(chosen) if entry.name not in elsewhere}
    return digest.of_text(
        sorted(decisive.items()), pipeline.fingerprint(chosen), digest.versions(), digest.of_sources(folders)
    )


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


def _input_name(node: fx.Node) -> str:
    """The name of a dynamo input in the user's terms: `x`, `linear.weight`, or dynamo's own name (a size, say)."""
    name = node.name.lower().removeprefix("l_").removeprefix("self_").strip("_")
    for kind in ("modules_", "parameters_", "buffers_"):
        name = name.replace(f"_{kind}", ".").removeprefix(kind)
    return name.replace("__", ".")
