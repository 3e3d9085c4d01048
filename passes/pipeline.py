"""The passes in their order. Reading this list is reading what happens to a graph."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx._lazy_graph_module import _make_graph_module

from npu_compiler.config import WHOLE_WEIGHTS, Options, TokenDrop, check_names
from npu_compiler.errors import NpuCompilerError, OptionError, PassError
from npu_compiler.graph import layers
from npu_compiler.graph.content import of_content
from npu_compiler.graph.digest import of_text
from npu_compiler.graph.rolled import Rolled, roll
from npu_compiler.graph.source import TIMES, beginning, origins_kept, raised
from npu_compiler.graph.spec import SpecCheck, lint, refresh_aliases
from npu_compiler.passes import (
    add_layer_norm,
    add_rms_norm,
    attention,
    attention_exchange,
    cat_split,
    common,
    constant_folding,
    dead_code,
    dual_batch_overlap,
    expert_communication,
    geglu,
    geglu_quant,
    gelu,
    gemma_rms_norm,
    layer_sharding,
    masked_embedding,
    matmul_all_reduce,
    matmul_bias,
    mul_add,
    noop,
    norm_bias,
    norm_cast,
    norm_quant,
    qk_norm_rope,
    reinplace,
    scale_by_one,
    sequence_parallel,
    shared_expert_rows,
    swiglu,
    swiglu_quant,
    token_drop,
    transpose_bmm,
    users,
    watch_all,
)
from npu_compiler.passes import watch as watch_places
from npu_compiler.passes.record import EnoughRewrites, Pass, PassRecord
from npu_compiler.passes.rewrite import apply

Hook = Callable[[fx.Graph], None]
Watch = Callable[[str, fx.GraphModule, "PassRecord | None"], None]
"""Called with the name of each stage, the program at it, and what the pass did that made it."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Until:
    """How far the pipeline runs: its first `passes` passes without the first `first` of them. The last may make
    `rewrites` rewrites (None: as many as it finds)."""

    passes: int
    rewrites: int | None = None
    first: int = 0


LAYERS_ONCE = "layers_once"
LOWERED, SHORTENED, AFTER_RULES = "lowered", "shortened", "after_rules"
"""Stages besides those that the passes leave: before all, without most of the equal layers, behind the last rule."""
USER_RULES = "user_rules"
BY_ROWS = {
    module.NAME: module.run
    for module in (sequence_parallel, attention_exchange, shared_expert_rows, dual_batch_overlap)
}
"""Passes that the number of rows in the option of their name switches on."""
PASSES: tuple[Pass, ...] = (
    Pass(noop.NAME, "first: patterns need not look through clones and views that do nothing", noop.run),
    Pass(common.NAME, "before the rules: one cos a model, not one a layer, is what pairs q with k", common.run),
    Pass(USER_RULES, "before the built-in rules: a user's own rule wins", rules=()),
    Pass(scale_by_one.NAME, "before the rules: what they look for is not hidden behind it", rules=scale_by_one.RULES),
    Pass(qk_norm_rope.NAME, "before add_rms_norm, which would claim the norms of q and k alone", qk_norm_rope.run),
    Pass(
        cat_split.NAME,
        "behind qk_norm_rope, which looks for cats; before the others, which find what a cat hid",
        rules=cat_split.RULES,
    ),
    Pass(
        gemma_rms_norm.NAME,
        "before add_rms_norm, which would leave the one to be added apart",
        rules=gemma_rms_norm.RULES,
    ),
    Pass(add_rms_norm.NAME, "any place among the rules", rules=add_rms_norm.RULES),
    Pass(norm_quant.NAME, "behind add_rms_norm, whose operators it looks for", rules=norm_quant.RULES),
    Pass(norm_cast.NAME, "behind norm_quant: what is quantized is not widened", rules=norm_cast.RULES),
    Pass(
        norm_bias.NAME,
        "behind norm_quant, which takes the bias along; before matmul_bias, which looks at additions too",
        rules=norm_bias.RULES,
    ),
    Pass(add_layer_norm.NAME, "any place among the rules", rules=add_layer_norm.RULES),
    Pass(swiglu.NAME, "any place among the rules", rules=swiglu.RULES),
    Pass(swiglu_quant.NAME, "behind swiglu, whose operators it looks for", rules=swiglu_quant.RULES),
    Pass(gelu.NAME, "before geglu, which looks for the operator", rules=gelu.RULES),
    Pass(geglu.NAME, "any place among the rules", rules=geglu.RULES),
    Pass(geglu_quant.NAME, "behind geglu, whose operator it looks for", rules=geglu_quant.RULES),
    Pass(
        attention.NAME,
        "before transpose_bmm and matmul_bias, which look at products and additions too",
        rules=attention.RULES,
    ),
    Pass(transpose_bmm.NAME, "any place among the rules", rules=transpose_bmm.RULES),
    Pass(matmul_bias.NAME, "behind the norms, which claim additions of a residual", rules=matmul_bias.RULES),
    Pass(
        matmul_all_reduce.NAME,
        "behind matmul_bias, whose bias it takes along; only with the option of its name",
        rules=matmul_all_reduce.RULES,
    ),
    Pass(
        sequence_parallel.NAME,
        "behind the norms and quantizations, which it takes along; only with the option of its name",
        sequence_parallel.run,
    ),
    Pass(
        attention_exchange.NAME,
        "behind sequence_parallel, whose scattered sums it takes too; only with the option of its name",
        attention_exchange.run,
    ),
    Pass(
        shared_expert_rows.NAME,
        "behind sequence_parallel, whose rows it works on; before token_drop and expert_communication, to which it "
        "leaves the routed experts alone; only with the option of its name",
        shared_expert_rows.run,
    ),
    Pass(
        layer_sharding.NAME,
        "behind attention_exchange and shared_expert_rows, whose whole weights it spreads; only with the option of its "
        "name and one of theirs",
        layer_sharding.run,
    ),
    Pass(
        token_drop.NAME,
        "behind sequence_parallel, whose part of a sum it then gives; only with the option of its name",
        token_drop.run,
    ),
    Pass(
        expert_communication.NAME,
        "in the place of token_drop, which is an all-to-all of its own; without that option",
        expert_communication.run,
    ),
    Pass(
        dual_batch_overlap.NAME,
        "behind sequence_parallel, attention_exchange, token_drop and expert_communication, which take sums away; only "
        "with the option of its name",
        dual_batch_overlap.run,
    ),
    Pass(masked_embedding.NAME, "before mul_add, which would take its arithmetic apart", rules=masked_embedding.RULES),
    Pass(mul_add.NAME, "last of the rules: it would take arithmetic apart that others look for", rules=mul_add.RULES),
    Pass(common.NAME, "again: the rules repeat small work, such as widening cos, in every layer", common.run),
    Pass(dead_code.NAME, "before reinplace: an unread view must not keep a clone alive", dead_code.run),
    Pass(reinplace.NAME, "behind all that may assume a functional program", reinplace.run),
    Pass(
        constant_folding.NAME,
        "last: reinplace has decided what is written, and what is written is no constant",
        constant_folding.run,
    ),
)


def selected(options: Options) -> tuple[Pass, ...]:
    """The passes of one compilation: the built-in ones, the user's in their places, without the disabled ones.

    Raises:
        OptionError: a disabled pass or rule does not exist, or a user's rule or pass can't be placed.
    """
    rules, passes = users.rules_of(options), users.passes_of(options)
    order = users.placed(users.with_rules(PASSES, USER_RULES, rules), passes, functional_until=reinplace.NAME)
    known = [rule.name for entry in order for rule in entry.rules]
    are_rules = dict.fromkeys(known, "it is a rule: name it in disabled_rules")
    layers_once = {LAYERS_ONCE: 'it is an option: {"layers_once": False}'}
    check_names("disabled_passes", options.disabled_passes, names(order), are_rules | layers_once)
    twice = next((rule.name for rule in rules if known.count(rule.name) > 1), None)
    if twice:
        raise OptionError(f"rule {twice!r} exists already", rule="names are used once", fix="choose another name")
    are_passes = dict.fromkeys(names(order), "it is a pass: name it in disabled_passes")
    check_names("disabled_rules", options.disabled_rules, known, are_passes)
    order = users.with_rules(order, matmul_all_reduce.NAME, matmul_all_reduce.rules(options.matmul_all_reduce))
    order = _with_rows(order, options)
    if not _spreads_layers(options):
        order = [entry for entry in order if entry.name != layer_sharding.NAME]
    order = _with_drop(order, options.token_drop)
    order = _with_communication(order, options)
    return tuple(entry for entry in order if entry.name not in options.disabled_passes)


def _with_rows(passes: Sequence[Pass], options: Options) -> tuple[Pass, ...]:
    """`passes` with those that work on a rank's own rows, from the rows on that the options of their names say, or
    without them for 0."""
    found = []
    for entry in passes:
        run = BY_ROWS.get(entry.name)
        rows = getattr(options, entry.name) if run is not None else 0
        if run is None:
            found.append(entry)
        elif rows:
            found.append(dataclasses.replace(entry, run=functools.partial(run, rows=rows)))
    return tuple(found)


def _spreads_layers(options: Options) -> bool:
    """Whether layer_sharding runs, which tells the layers of a model apart."""
    has_whole_weights = any(getattr(options, name) for name in WHOLE_WEIGHTS)
    return options.layer_sharding and has_whole_weights and layer_sharding.NAME not in options.disabled_passes


def _with_drop(passes: Sequence[Pass], given: Mapping[str, Any]) -> tuple[Pass, ...]:
    """`passes` with token_drop as the option says, or without it."""
    if not given:
        return tuple(entry for entry in passes if entry.name != token_drop.NAME)
    run = functools.partial(token_drop.run, drop=TokenDrop.of(given))
    return tuple(dataclasses.replace(entry, run=run) if entry.name == token_drop.NAME else entry for entry in passes)


def _with_communication(passes: Sequence[Pass], options: Options) -> tuple[Pass, ...]:
    """`passes` with expert_communication as the options say, or without it where token_drop does its work."""
    if options.token_drop:
        return tuple(entry for entry in passes if entry.name != expert_communication.NAME)
    run = functools.partial(
        expert_communication.run,
        asked=options.expert_communication,
        tokens=options.expert_tokens,
        captured=options.expert_graph_tokens,
        alone=options.expert_group,
    )
    return tuple(
        dataclasses.replace(entry, run=run) if entry.name == expert_communication.NAME else entry for entry in passes
    )


def run(
    module: fx.GraphModule,
    options: Options,
    *,
    after_rules: Hook | None = None,
    watch: Watch | None = None,
    until: Until | None = None,
) -> list[PassRecord]:
    """Runs the selected passes on `module` in place and returns what each did. `run_rolled` leaves equal layers rolled
    up.

    Args:
        after_rules: called with the graph when all rules have run and it is still functional (before reinplace). With a
            true attribute `local` (see Pass) it may be called with a program of a few layers.
        watch: shown every stage; the records then hold every attempt of a rule.
        until: where the pipeline ends, for who looks for the pass or the rewrite that is to blame. All of equal layers
            are then compiled.
    """
    if watch is not None:
        watch(LOWERED, module, None)
    if until is not None:
        return _run_all(module, options, after_rules, watch, until)
    first, last = watch_places.pass_of(options.watch), watch_all.pass_of(options.watch)
    records = [_run_alone(first, module, options, watch)] if first is not None else []
    found, rolled = _run_layers(module, options, after_rules, watch)
    records += found
    if rolled is not None:
        module.graph = rolled.whole.graph
    return [*records, _run_alone(last, module, options, watch)] if last is not None else records


def run_rolled(
    module: fx.GraphModule, options: Options, after_rules: Hook | None = None, watch: Watch | None = None
) -> tuple[list[PassRecord], Rolled | None]:
    """`run`, for who wants the program with its equal layers rolled up, where it has such: then `module` is not what
    comes out of the passes. `options` watch nothing."""
    if watch is not None:
        watch(LOWERED, module, None)
    return _run_layers(module, options, after_rules, watch)


def _run_alone(entry: Pass, module: fx.GraphModule, options: Options, watch: Watch | None) -> PassRecord:
    """Runs a pass that every layer of the program is shown to."""
    record = run_pass(entry, module, options, SpecCheck(module) if options.check else None)
    if watch is not None:
        watch(entry.name, module, record)
    return record


def _run_layers(
    module: fx.GraphModule, options: Options, after_rules: Hook | None, watch: Watch | None
) -> tuple[list[PassRecord], Rolled | None]:
    """Runs the passes, on a few of a program's equal layers where it has such: these are rolled up then."""
    record = PassRecord(LAYERS_ONCE, nodes_before=count_calls(module.graph), nodes_after=count_calls(module.graph))
    found = _run_once(module, options, after_rules, watch, record) if _is_local(options, after_rules) else None
    records, rolled = (_run_all(module, options, after_rules, watch), None) if found is None else found
    return ([record, *records] if record.fired or record.refused else records), rolled


def _run_all(
    module: fx.GraphModule,
    options: Options,
    after_rules: Hook | None,
    watch: Watch | None,
    until: Until | None = None,
) -> list[PassRecord]:
    records: list[PassRecord] = []
    check = SpecCheck(module) if options.check else None
    passes = selected(options)
    until = until or Until(len(passes))
    for index, entry in enumerate(passes[: until.passes]):
        if index < until.first:
            continue
        if entry.name == reinplace.NAME and after_rules is not None:
            with origins_kept(module.graph, AFTER_RULES), _blamed(AFTER_RULES, module.graph):
                after_rules(module.graph)
            if watch is not None:
                watch(AFTER_RULES, module, None)
        most = until.rewrites if index + 1 == until.passes else None
        records.append(run_pass(entry, module, options, check, attempts=watch is not None, most=most))
        if watch is not None:
            watch(entry.name, module, records[-1])
    return records


def _is_local(options: Options, after_rules: Hook | None) -> bool:
    """Whether a program of a few layers shows what happens to all: not where a pass or a user's code tells them
    apart."""
    apart = options.rules or not all(entry.local for entry in users.passes_of(options)) or _spreads_layers(options)
    return options.layers_once and not apart and (after_rules is None or getattr(after_rules, "local", False))


def _run_once(
    module: fx.GraphModule, options: Options, after_rules: Hook | None, watch: Watch | None, record: PassRecord
) -> tuple[list[PassRecord], Rolled] | None:
    """Runs the passes on a few of a program's equal layers. None where there are no such layers, or where the rewritten
    ones are not equal, which the record says; `module` is as it was."""
    start = time.perf_counter()
    found = layers.find(module.graph)
    if isinstance(found, str):
        if found:
            record.refuse(LAYERS_ONCE, module.graph.output_node(), found)
        return None
    check = SpecCheck(module) if options.check else None
    short = _make_graph_module(module, layers.shortened(found))  # of the kind that `lower` asks for
    if watch is not None:
        watch(SHORTENED, short, None)
    between = time.perf_counter()
    records = _run_all(short, options, after_rules, watch)
    again = time.perf_counter()
    first = found.calls[found.run.start]
    rolled = roll(short, found)
    if isinstance(rolled, str):
        record.refuse(LAYERS_ONCE, first, rolled)
    else:
        record.fire(f"{LAYERS_ONCE}: {found.run.count} equal layers, {layers.KEPT} compiled", first, [])
        if check is not None:
            check.after(LAYERS_ONCE, rolled.whole)
    record.seconds = time.perf_counter() - again + between - start
    if watch is not None:
        watch(LAYERS_ONCE, module if isinstance(rolled, str) else rolled.whole, record)
    return None if isinstance(rolled, str) else (records, rolled)


def run_pass(
    entry: Pass,
    module: fx.GraphModule,
    options: Options,
    check: SpecCheck | None = None,
    attempts: bool = False,
    most: int | None = None,
) -> PassRecord:
    """Runs one pass on `module` in place, and checks what it left if `check` is given.

    Args:
        attempts: note every attempt of a rule.
        most: how many rewrites it may make.
    """
    record = PassRecord(
        entry.name, frozenset(options.disabled_rules), nodes_before=count_calls(module.graph), most=most
    )
    record.attempts = [] if attempts else None
    start = time.perf_counter()
    if entry.run is not None:
        before = users.shape_of(module.graph) if entry.before or entry.after else []
        with contextlib.suppress(EnoughRewrites), _blamed(entry.name, module.graph):
            entry.run(module, record)
            if before and not record.fired:
                users.note_unrecorded(before, module.graph, record)
    else:
        if entry.name == USER_RULES:
            users.note_idle_rules(module.graph, entry.rules, record)
        apply(module, entry.rules, record)
    if entry.run is not None or record.fired:  # rules that did not fire leave the program as it was
        lint(entry.name, module.graph)
        refresh_aliases(module.graph)
        module.recompile()
    record.seconds = time.perf_counter() - start
    record.nodes_after = count_calls(module.graph)
    if record.fired or record.refused:
        logger.debug("%s", record)
    if check is not None:
        check.after(entry.name, module)
    return record


@contextlib.contextmanager
def _blamed(name: str, graph: fx.Graph) -> Iterator[None]:
    """Whatever a pass raises becomes an error that names the pass, and the graph by its first line."""
    place = beginning(graph)
    try:
        yield
    except (NpuCompilerError, EnoughRewrites):
        raise
    except Exception as error:
        raise PassError(
            f"pass {name!r} failed: {raised(error)}",
            where=f"the graph that begins at {place}" if place else "",
            rule="a pass takes every functional program, and leaves alone what it does not know",
            fix="correct it: in vLLM it is a pass of inductor_compile_config, or vLLM's own"
            if name == AFTER_RULES
            else f'correct it, or leave it out with options={{"disabled_passes": ["{name}"]}}',
        ) from error


def count_calls(graph: fx.Graph) -> int:
    """How many calls a graph makes (inputs and the output are not calls), in all the layers that it stands for."""
    kinds = ("call_function", "call_module", "call_method")
    return sum(node.meta.get(TIMES, 1) for node in graph.nodes if node.op in kinds)


def fingerprint(options: Options) -> str:
    """Identity of what `run` would do: the passes in order, with the content of the user's own, and disabled rules.

    Raises:
        OptionError: a user's rule or pass has no content to go by (graph/content.py).
    """
    own = (users.rules_of(options), users.passes_of(options))
    return of_text(
        names(selected(options)), sorted(options.disabled_rules), of_content(own, "the user's rules and passes")
    )


def own_content(options: Options) -> dict[str, str]:
    """A hash of the content of each rule and pass of the user, by its kind and name.

    Raises:
        OptionError: see `fingerprint`.
    """
    own = {f"rule {rule.name}": rule for rule in users.rules_of(options)}
    own |= {f"pass {entry.name}": entry for entry in users.passes_of(options)}
    return {name: of_content(one, f"the user's {name}") for name, one in own.items()}


def names(passes: Sequence[Pass] = PASSES) -> list[str]:
    """The passes' names in order."""
    return [entry.name for entry in passes]
