"""Every option of the `ascend` backend, typed, in one place.

Options arrive as `torch.compile(model, backend="ascend", options={...})`. Unknown, ill-typed and contradictory ones are
refused; the nearest valid name is part of the message.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from npu_compiler.errors import OptionError

MULTISTREAM = ("off", "auto")
WEIGHT_NZ = ("off", "quantized", "all", "auto")
EXPERT_COMMUNICATION = ("auto", "allgather", "alltoall", "mc2", "fused_mc2")
CAPTURERS = ("ascend", "npugraph_ex")
DUMP_INPUTS = ("off", "call", "all")
WATCHES = ("stats", "values", "nan", "inf")
WATCH = "NPU_COMPILER_WATCH"
"""Environment variable with entries of the option `watch`, separated by commas; the option comes first."""
DROP_BY = ("score", "arrival")
BY_ROWS = ("sequence_parallel", "attention_exchange", "shared_expert_rows", "dual_batch_overlap")
"""Options that are the fewest rows at which rows are worked on in parts (docs/parallel.md)."""
CAPTURE_ERROR_MODES = ("global", "thread_local", "relaxed")


@dataclass(frozen=True)
class TokenDrop:
    """What the option `token_drop` may hold: one of the first two, and the rest.

    Attributes:
        capacity_factor: a rank has room for so many times the rows that another one would send it if all got as many.
        max_drop_ratio: the room is made so large that no routing loses more than this part of a rank's rows.
        by: which rows stay: those of the largest router weights ("score"), or of the first experts ("arrival").
        renormalise: scale up the weights of a token that stay to the sum of all of them.
    """

    capacity_factor: float | None = None
    max_drop_ratio: float | None = None
    by: str = "score"
    renormalise: bool = False

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> TokenDrop:
        """Reads the option.

        Raises:
            OptionError: a name or a value is not valid, or there is not one of the first two.
        """
        valid = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in valid:
                rule = f"token_drop takes {', '.join(valid)}"
                raise OptionError(f"token_drop has {name!r}", rule=rule, fix=_nearest(name, valid))
        if len({"capacity_factor", "max_drop_ratio"} & given.keys()) != 1:
            raise OptionError(
                f"token_drop={dict(given)} does not say how much room there is",
                rule="it has either capacity_factor or max_drop_ratio",
                fix='write for example token_drop={"capacity_factor": 1.25}',
            )
        drop = cls(**given)
        if "capacity_factor" in given and not 0 < _number(drop.capacity_factor) <= 1024:
            raise OptionError(
                f"token_drop: capacity_factor={drop.capacity_factor!r} leaves no room",
                rule="it is a number above 0; as many as the ranks never drops",
                fix="use for example 1.25",
            )
        if "max_drop_ratio" in given and not 0 <= _number(drop.max_drop_ratio) < 1:
            raise OptionError(
                f"token_drop: max_drop_ratio={drop.max_drop_ratio!r} is no part of the rows",
                rule="it is a number from 0, which never drops, to below 1",
                fix="use for example 0.1",
            )
        if drop.by not in DROP_BY:
            raise _unknown_value("token_drop: by", drop.by, DROP_BY)
        if type(drop.renormalise) is not bool:
            raise OptionError(
                f"token_drop: renormalise={drop.renormalise!r}", rule="it is true or false", fix="write one of them"
            )
        return drop


def _number(value: Any) -> float:
    """NaN for what is none, which no comparison holds for."""
    return value if type(value) in (int, float) else math.nan


@dataclass(frozen=True)
class Options:
    """What a user may choose. The field comments are the documentation of record."""

    capture: bool = True
    """Record the compiled graph into ACL graphs and replay them. False: call it operator by operator."""
    capture_limit: int = 64
    """How many captured graphs (one a shape) a compiled graph keeps; the least recently used one goes first."""
    capture_sizes: tuple[int, ...] = ()
    """Capture only calls whose dynamic sizes are all in this list; others are called uncaptured. Empty: all.
    With one dynamic size, the first capture gets memory for the largest in the list."""
    capture_budget_seconds: float = 0.0
    """Seconds that all captures of a compiled graph may take, estimated before each from those before it. A shape that
    does not fit is called uncaptured, with one CaptureBudgetWarning. 0: no limit."""
    capture_budget_mib: float = 0.0
    """MiB of device memory that a compiled graph's captures may take, input buffers included, estimated from the memory
    plan. As above."""
    capture_budget_streams: int = 0
    """Streams that the captured graphs of a compiled graph may use together. As above."""
    capture_error_mode: str = "thread_local"
    """Which threads CANN bars from blocking copies during a capture (aclmdlRICaptureMode): all ("global"), the one
    that captures ("thread_local"), none ("relaxed")."""
    multistream: str = "off"
    """"auto": put independent calls on side streams of a captured graph where the estimate says that it pays."""
    stream_limit: int = 2
    """How many streams a captured graph may use with multistream, the main one included."""
    capture_with: str = "ascend"
    """Who captures and replays the rewritten program: "ascend", or "npugraph_ex", torch_npu's own backend."""
    npugraph_ex: Mapping[str, Any] = field(default_factory=dict)
    """npugraph_ex's options, where it captures; for example {"static_kernel_compile": True}."""
    clone_outputs: bool = True
    """Hand out copies of a captured graph's outputs. False: hand out the graph's own tensors, and refuse the next
    replay, of any shape, with StaleOutputError while one of them is still in use."""
    disabled_passes: tuple[str, ...] = ()
    """Names of passes to leave out (npu_compiler.passes.pipeline lists them), to find out which one is to blame."""
    disabled_rules: tuple[str, ...] = ()
    """Names of rules to leave out of their passes, for the same purpose."""
    rules: tuple[Any, ...] = ()
    """Your own rewrite rules (passes.rewrite.Rule), or "module:name" of a rule or a list of them. They run as the pass
    `user_rules`, in front of the built-in rules."""
    passes: tuple[Any, ...] = ()
    """Your own passes (passes.record.Pass, placed by `before` or `after`), or "module:name" of a pass or a list."""
    matmul_all_reduce: int = 0
    """Fewest rows at which a matrix product and its sum over the ranks are one operator, which CANN has for Atlas A2
    only and advises for prompts, not for decode steps. 0: never. Give all ranks the same number."""
    sequence_parallel: int = 0
    """Fewest rows at which the sums of tensor parallelism become a reduce-scatter and an all-gather, with norms between
    the two on a rank's own rows. A program is rewritten where it is proven to have as many; 1: always. 0: never. Give
    all ranks the same number."""
    attention_exchange: int = 0
    """Fewest rows at which attention's output goes to the ranks by rows and is multiplied there with the whole output
    projection, which each rank then keeps beside its part: nothing is summed over the ranks. 1: always. 0: never. Give
    all ranks the same number."""
    shared_expert_rows: int = 0
    """Fewest rows at which a shared expert, where sequence_parallel gathers its rows, is computed on a rank's own rows
    with whole weights, which each rank then keeps beside its part. 1: always. 0: never. Give all ranks the same
    number."""
    dual_batch_overlap: int = 0
    """Fewest rows at which what is between attentions is computed in two halves of the rows, so that one half's sums
    over the ranks run beside what is computed of the other. 2: wherever there are two. 0: never. Give all ranks the
    same number."""
    layer_sharding: bool = False
    """Of the whole weights that attention_exchange and shared_expert_rows keep, each rank keeps those of every n-th
    layer; a layer's are broadcast to the others before it runs. For all ranks alike."""
    expert_communication: str = "auto"
    """How tokens get to the ranks of their experts, with expert parallelism: "allgather", "alltoall", "mc2" or
    "fused_mc2"; "auto": what a table says for the chip and the sizes (docs/moe.md). Give all ranks the same."""
    expert_tokens: int = 0
    """Most tokens of a call, for that table; 0: only the program's sizes say. In vLLM it is the compile range's end."""
    expert_graph_tokens: int = 0
    """Most tokens of a captured graph, for that table; 0: not known. In vLLM it is the largest capture size."""
    expert_group: str = ""
    """Name of a process group of the ranks that experts are spread over, in which nothing else communicates, for "mc2".
    In vLLM it is "ep:0"."""
    token_drop: Mapping[str, Any] = field(default_factory=dict)
    """Send tokens to the ranks of their experts in buffers of a fixed size, and drop what has no room (TokenDrop). For
    example {"capacity_factor": 1.25, "by": "score", "renormalise": False}. Give all ranks the same."""
    cache: bool = False
    """Keep compiled programs on disk (npu_compiler/cache.py); the next process that compiles the same function for the
    same inputs skips everything behind Dynamo. $NPU_COMPILER_CACHE names the folder."""
    freeze: bool = False
    """Take parameters and buffers as constants: what depends on them alone is computed once, and again when one of them
    was written or replaced. Writes through `.data` go unnoticed."""
    weight_nz: str = "off"
    """Lay weights that only matrix products read out in FRACTAL_NZ, in place, before the first call: those of int8
    products ("quantized"), float16 and bfloat16 ones too ("all"), or the large ones of them that it does not pad
    ("auto"). It sets torch.npu.config.allow_internal_format."""
    reorder: bool = True
    """Put the calls into the order that needs the least memory, where another one than the program's own does."""
    layers_once: bool = True
    """Run the passes on a few of a model's equal layers and repeat what they made of one (graph/layers.py)."""
    check: bool = False
    """Check the program after every pass (graph/spec.py); a pass that breaks it is named in a SpecError."""
    watch: tuple[str, ...] = ()
    """Values to look at while the program runs, captured or not: "PLACE:WHAT", with a module path
    ("model.layers.3.mlp", "model.layers.*"), a line ("model.py:88") or "*" (what is behind the passes) for PLACE, and
    stats, values, nan or inf for WHAT. Empty: $NPU_COMPILER_WATCH."""
    watch_print: bool = True
    """Print what was noted behind each call, which waits for the device. False: only `npu_compiler.watched()` reads."""
    watch_save: str = ""
    """Folder to write what was noted to, behind each call. Empty: none."""
    watch_keep: int = 16
    """How many calls a watched value is kept until `npu_compiler.watched()` reads it."""
    dump: str = ""
    """Folder for a bundle of everything that was done (npu_compiler/inspect). Empty: $NPU_COMPILER_DUMP, or no dump."""
    dump_inputs: str = "off"
    """"call": put the first call's inputs into the bundle, without parameters, buffers and other tensors that stay.
    "all": with them."""
    print_pipeline: bool = False
    """Print to standard error what was done to each graph, in order, when it is compiled: `npu-compiler show`'s text.
    $NPU_COMPILER_PRINT_PIPELINE=1 does the same."""

    def __post_init__(self) -> None:
        if self.capture_limit < 1:
            raise OptionError(
                f"capture_limit={self.capture_limit} keeps no captured graph",
                rule="capture_limit is at least 1",
                fix='use options={"capture": False} to call the compiled graph without capture',
            )
        if any(size < 1 for size in self.capture_sizes) or len(set(self.capture_sizes)) != len(self.capture_sizes):
            raise OptionError(
                f"capture_sizes={self.capture_sizes} can't work",
                rule="sizes are positive and named once",
                fix="list each dynamic size to capture once, for example capture_sizes=(1, 2, 4, 8)",
            )
        for entry in self.watch:
            watched(entry)
        if self.watch_keep < 1:
            raise OptionError(
                f"watch_keep={self.watch_keep} keeps nothing", rule="watch_keep is at least 1", fix="leave it out"
            )
        if self.matmul_all_reduce < 0:
            raise OptionError(
                f"matmul_all_reduce={self.matmul_all_reduce} is no number of rows",
                rule="matmul_all_reduce is the fewest rows that are worth one operator, or 0",
                fix="use for example 256, or leave the option out",
            )
        for name in BY_ROWS:
            least = 2 if name == "dual_batch_overlap" else 1  # one row has no halves
            if getattr(self, name) and getattr(self, name) < least:
                raise OptionError(
                    f"{name}={getattr(self, name)} is no number of rows",
                    rule=f"{name} is the fewest rows at which it is worth it, {least} or more, or 0",
                    fix=f"use for example 1000, {least} for all programs, or leave the option out",
                )
            if getattr(self, name) and self.matmul_all_reduce:
                raise OptionError(
                    f"{name} and matmul_all_reduce both want the sums over the ranks",
                    rule="a sum is joined with its product, or taken apart",
                    fix="leave one of the two out",
                )
        if self.token_drop:
            TokenDrop.of(self.token_drop)
            if self.expert_communication not in ("auto", "alltoall"):
                raise OptionError(
                    f"token_drop and expert_communication={self.expert_communication!r} contradict each other",
                    rule="what token_drop bounds are the buffers of an all-to-all",
                    fix="leave one of the two out",
                )
        if self.expert_communication not in EXPERT_COMMUNICATION:
            raise _unknown_value("expert_communication", self.expert_communication, EXPERT_COMMUNICATION)
        for name in ("expert_tokens", "expert_graph_tokens"):
            if getattr(self, name) < 0:
                raise OptionError(
                    f"{name}={getattr(self, name)} is no number of tokens", rule="it is at least 0", fix="leave it out"
                )
        for name in ("capture_budget_seconds", "capture_budget_mib", "capture_budget_streams"):
            if not 0 <= getattr(self, name) < math.inf:
                raise OptionError(
                    f"{name}={getattr(self, name)} is no budget",
                    rule="a budget is a positive number; 0 sets no limit",
                    fix='use options={"capture": False} to call the compiled graph without capture',
                )
        if self.capture_error_mode not in CAPTURE_ERROR_MODES:
            raise _unknown_value("capture_error_mode", self.capture_error_mode, CAPTURE_ERROR_MODES)
        if self.multistream not in MULTISTREAM:
            raise _unknown_value("multistream", self.multistream, MULTISTREAM)
        if self.weight_nz not in WEIGHT_NZ:
            raise _unknown_value("weight_nz", self.weight_nz, WEIGHT_NZ)
        if self.stream_limit < 1:
            raise OptionError(
                f"stream_limit={self.stream_limit} leaves no stream",
                rule="stream_limit counts the main stream too",
                fix="use 2 or more, or multistream='off'",
            )
        if self.capture_with not in CAPTURERS:
            raise _unknown_value("capture_with", self.capture_with, CAPTURERS)
        if self.dump_inputs not in DUMP_INPUTS:
            raise _unknown_value("dump_inputs", self.dump_inputs, DUMP_INPUTS)

    @classmethod
    def of(cls, given: Mapping[str, Any] | Options | None) -> Options:
        """Reads the `options` of torch.compile.

        Raises:
            OptionError: a name, type or value is not valid, or two options contradict each other.
        """
        if isinstance(given, Options):
            return given
        given = dict(given or {})
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name in given:
            if name not in fields:
                raise OptionError(
                    f"unknown option {name!r}", rule=f"options are {', '.join(fields)}", fix=_nearest(name, fields)
                )
        values = {name: _typed(name, getattr(DEFAULTS, name), value) for name, value in given.items()}
        _refuse_contradictions(values)
        if not values.get("watch") and os.environ.get(WATCH):
            values["watch"] = tuple(os.environ[WATCH].split(","))
        return cls(**values)


def watched(entry: str) -> tuple[str, str]:
    """The place and the kind of an entry of the option `watch`.

    Raises:
        OptionError: it is none.
    """
    place, _, what = entry.strip().rpartition(":")
    if not place or what not in WATCHES:
        raise OptionError(
            f"watch names {entry!r}",
            rule=f"it is PLACE:WHAT, with {', '.join(WATCHES)} for WHAT",
            fix="write for example watch=['model.layers.3.mlp:stats', 'model.py:88:values', '*:nan']",
        )
    if place == "*" and what not in ("nan", "inf"):
        raise OptionError(
            f"watch names {entry!r}: every value of a program",
            rule="all values can be watched for NaN and infinite ones only; to keep them all would take their memory",
            fix="name a module or a line, or write '*:nan'",
        )
    return place, what


DEFAULTS = Options()
DECIDE_NOTHING = frozenset(
    {"cache", "check", "dump", "dump_inputs", "print_pipeline", "watch_print", "watch_save", "watch_keep"}
)
"""Options that the compiled program does not depend on."""
OF_CAPTURES = (
    "capture_limit",
    "capture_sizes",
    "capture_budget_seconds",
    "capture_budget_mib",
    "capture_budget_streams",
    "capture_error_mode",
    "clone_outputs",
)
"""Options that describe the captured graphs of this backend."""
WHOLE_WEIGHTS = ("attention_exchange", "shared_expert_rows")
"""Options with which a rank has weights whole, of which it was given a part."""
OF_WEIGHTS = ("freeze", *WHOLE_WEIGHTS)
"""Options with which a program keeps what it computed from the weights."""
OF_STREAMS = ("multistream", "stream_limit")
"""Options that describe what a capture finds, whoever makes it."""


def _refuse_contradictions(values: Mapping[str, Any]) -> None:
    if values.get("layer_sharding") and not any(values.get(name) for name in WHOLE_WEIGHTS):
        raise OptionError(
            "layer_sharding has no weights to spread over the ranks",
            rule=f"it spreads the whole weights that {' and '.join(WHOLE_WEIGHTS)} keep",
            fix='add for example {"attention_exchange": 1000}, or leave it out',
        )
    sides: list[tuple[str, tuple[str, ...], str]] = []
    if values.get("capture") is False:
        sides.append(("capture=False", (*OF_CAPTURES, "capture_with", "npugraph_ex"), "capture=False makes none"))
    if values.get("capture_with") == "npugraph_ex":
        sides.append(
            ("capture_with='npugraph_ex'", (*OF_CAPTURES, *OF_STREAMS), "npugraph_ex has options of its own for that")
        )
        sides.append(("capture_with='npugraph_ex'", ("watch",), "npugraph_ex's own passes don't know the notes"))
    elif values.get("npugraph_ex"):
        sides.append(("capture_with='ascend'", ("npugraph_ex",), "only npugraph_ex reads them"))
    for side, others, why in sides:
        needless = [name for name in others if name in values]
        if needless:
            raise OptionError(
                f"{side} contradicts {', '.join(needless)}",
                rule=f"these options describe captured graphs, and {why}",
                fix="drop one side",
            )

    if "stream_limit" in values and values.get("multistream", DEFAULTS.multistream) == "off":
        raise OptionError(
            f"stream_limit={values['stream_limit']} limits nothing",
            rule="without multistream='auto' a captured graph has one stream",
            fix="write multistream='auto' beside it, or leave it out",
        )


def _unknown_value(option: str, value: str, valid: Iterable[str]) -> OptionError:
    return OptionError(
        f"{option}={value!r} is unknown", rule=f"it is one of {', '.join(valid)}", fix=_nearest(value, valid)
    )


def refuse_mode(mode: str | None) -> None:
    """Refuses torch.compile's `mode`: its presets name Inductor's settings, and one would be ignored in silence."""
    if mode in (None, "default"):
        return
    hints = {
        "reduce-overhead": "leave mode out: captured graphs are this backend's default",
        "max-autotune": "leave mode out: the backend has no autotuning",
        "max-autotune-no-cudagraphs": 'leave mode out and use options={"capture": False}',
    }
    raise OptionError(
        f"mode={mode!r} has no meaning for backend='ascend'",
        rule="torch.compile's modes are presets of the inductor backend",
        fix=hints.get(mode or "", "leave mode out, use options={...}"),
    )


def check_names(
    option: str, given: Iterable[str], valid: Iterable[str], elsewhere: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Raises OptionError for the first given name that is not valid, with the nearest one that is; or with the fix that
    `elsewhere` has for a name of something else."""
    valid = list(dict.fromkeys(valid))  # a pass may run twice
    for name in given:
        if name not in valid:
            raise OptionError(
                f"{option} names {name!r}, which does not exist",
                rule=f"known: {', '.join(valid)}",
                fix=elsewhere.get(name) or _nearest(name, valid),
            )


def _typed(name: str, default: Any, value: Any) -> Any:
    if isinstance(default, tuple):
        inner = {"capture_sizes": int, "rules": object, "passes": object}.get(name, str)
        if isinstance(value, (list, tuple)) and all(inner is object or type(item) is inner for item in value):
            return tuple(value)
        expected = f"a list of {name if inner is object else inner.__name__}"
    elif type(value) is type(default):
        return value
    elif isinstance(default, float) and type(value) is int:
        return float(value)
    elif isinstance(default, Mapping):
        expected = "a dict of npugraph_ex's options" if name == "npugraph_ex" else "a dict of settings"
    else:
        expected = type(default).__name__
    fix = f"write {name}=[...]" if isinstance(default, tuple) else "correct the type"
    raise OptionError(f"option {name}={reprlib.repr(value)} has a wrong type", rule=f"{name} is {expected}", fix=fix)


def _nearest(name: str, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "see docs/compiler.md for the list"
