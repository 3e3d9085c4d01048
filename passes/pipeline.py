"""The passes in their order. Reading this list is reading what happens to a graph."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import fx

from npu_compiler.config import Options, check_names
from npu_compiler.graph.digest import of_text
from npu_compiler.passes import add_rms_norm, common, dead_code, noop, qk_norm_rope, reinplace, swiglu
from npu_compiler.passes.record import Pass, PassRecord
from npu_compiler.passes.rewrite import apply

PASSES: tuple[Pass, ...] = (
    Pass(noop.NAME, "first: patterns need not look through clones and views that do nothing", noop.run),
    Pass(common.NAME, "before the rules: one cos a model, not one a layer, is what pairs q with k", common.run),
    Pass(qk_norm_rope.NAME, "before add_rms_norm, which would claim the norms of q and k alone", qk_norm_rope.run),
    Pass(add_rms_norm.NAME, "any place among the rules", rules=add_rms_norm.RULES),
    Pass(swiglu.NAME, "any place among the rules", rules=swiglu.RULES),
    Pass(common.NAME, "again: the rules repeat small work, such as widening cos, in every layer", common.run),
    Pass(dead_code.NAME, "before reinplace: an unread view must not keep a clone alive", dead_code.run),
    Pass(reinplace.NAME, "last: all before it may assume a functional program", reinplace.run),
)


def selected(options: Options) -> tuple[Pass, ...]:
    """The passes left after `disabled_passes`.

    Raises:
        OptionError: a disabled pass or rule does not exist.
    """
    check_names("disabled_passes", options.disabled_passes, names())
    check_names("disabled_rules", options.disabled_rules, [rule.name for entry in PASSES for rule in entry.rules])
    return tuple(entry for entry in PASSES if entry.name not in options.disabled_passes)


def run(
    module: fx.GraphModule,
    options: Options,
    *,
    after_rules: Callable[[fx.Graph], None] | None = None,
    dump_name: str = "graph",
) -> list[PassRecord]:
    """Runs the selected passes on `module` in place and returns what each did.

    Args:
        after_rules: called with the graph when all rules have run and it is still functional (before reinplace).
    """
    records = []
    dump = _dumper(options.dump_dir, dump_name)
    dump("lowered", module)
    for entry in selected(options):
        if entry.name == reinplace.NAME and after_rules is not None:
            after_rules(module.graph)
            dump("after_rules", module)
        records.append(run_pass(entry, module, options))
        dump(entry.name, module)
    return records


def run_pass(entry: Pass, module: fx.GraphModule, options: Options) -> PassRecord:
    """Runs one pass on `module` in place."""
    record = PassRecord(entry.name, frozenset(options.disabled_rules), nodes_before=count_calls(module.graph))
    start = time.perf_counter()
    if entry.run is not None:
        entry.run(module, record)
    else:
        apply(module, entry.rules, record)
    module.graph.lint()
    module.recompile()
    record.seconds = time.perf_counter() - start
    record.nodes_after = count_calls(module.graph)
    return record


def count_calls(graph: fx.Graph) -> int:
    """How many calls a graph makes (inputs and the output are not calls)."""
    return sum(node.op in ("call_function", "call_module", "call_method") for node in graph.nodes)


def fingerprint(options: Options) -> str:
    """Identity of what `run` would do: the options that reach the passes, and the passes in order."""
    return of_text([entry.name for entry in selected(options)], options.disabled_rules)


def _dumper(folder: str, name: str) -> Callable[[str, fx.GraphModule], None]:
    """Writes `<folder>/<name>.<NN>.<stage>.py`, the program as text, at every call; does nothing without a folder."""
    if not folder:
        return lambda stage, module: None
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    stages: list[str] = []

    def dump(stage: str, module: fx.GraphModule) -> None:
        text = module.print_readable(print_output=False, include_stride=True)
        (target / f"{_file_name(name)}.{len(stages):02}.{stage}.py").write_text(text)
        stages.append(stage)

    return dump


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)


def names(passes: Sequence[Pass] = PASSES) -> list[str]:
    """The passes' names in order."""
    return [entry.name for entry in passes]
