"""The plugin's own options: the keys of vLLM's `additional_config`.

vllm serve MODEL --additional-config '{"report_path": "run.json"}'
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from npu_compiler.backend import checked_options
from npu_compiler.config import BY_ROWS, OF_CAPTURES, Options
from npu_compiler.errors import OptionError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

OVER_RANKS = (*BY_ROWS, "matmul_all_reduce", "layer_sharding")
"""Compile options that do nothing without tensor parallelism."""
OF_EXPERTS = ("token_drop", "expert_communication")
"""Compile options that do nothing where all experts are on one rank."""
QKV_ATTENTION = "npu_compiler.passes.qkv_attention:PASS"
"""The pass that only a vLLM model has use for."""


@dataclasses.dataclass(frozen=True)
class ExpertRebalance:
    """The option `expert_rebalance`: changing the map of experts while a model is served (docs/eplb.md)."""

    interval: int
    """Steps between two looks at what experts got."""

    redundant: int = 0
    """How many slots there are beyond one for each expert, on all ranks together. With `expert_map` it is the map's."""

    least_gain: float = 0.05
    """A new map is taken where the fullest rank would have got less by this part, at least."""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> ExpertRebalance | None:
        """The option as it was given, checked; None: it was not.

        Raises:
            ValueError: a key is unknown or has a value that means nothing.
        """
        if not given:
            return None
        known = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                raise ValueError(f"additional_config: expert_rebalance: unknown key {name!r}; {_nearest(name, known)}")
        gain, interval, redundant = given.get("least_gain", 0.0), given.get("interval"), given.get("redundant", 0)
        if type(interval) is not int or interval < 1:
            raise ValueError(f"additional_config: expert_rebalance: interval must be steps >= 1, got {interval!r}")
        if type(redundant) is not int or redundant < 0:
            raise ValueError(f"additional_config: expert_rebalance: redundant must be experts >= 0, got {redundant!r}")
        if isinstance(gain, bool) or not isinstance(gain, (int, float)) or not 0 <= gain < 1:
            raise ValueError(f"additional_config: expert_rebalance: least_gain must be 0 to 1, got {gain!r}")
        return cls(**given)


@dataclasses.dataclass(frozen=True)
class FineGrainedTP:
    """The option `fine_grained_tp`: over how many data-parallel engines weights of a kind are split, 1: over none
    (docs/placements.md). vllm-ascend's `finegrained_tp_config`."""

    lm_head: int = 1
    """vllm-ascend's `lmhead_tensor_parallel_size`."""

    o_proj: int = 1
    """Attention's output projections; `oproj_tensor_parallel_size`."""

    mlp: int = 1
    """MLPs of layers that have no experts; `mlp_tensor_parallel_size`."""

    embedding: int = 1
    """`embedding_tensor_parallel_size`."""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> FineGrainedTP:
        """The option as it was given, checked.

        Raises:
            ValueError: a kind of weights is unknown, or its number of engines is none.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name, size in given.items():
            if name not in known:
                raise ValueError(f"additional_config: fine_grained_tp: unknown key {name!r}; {_nearest(name, known)}")
            if type(size) is not int or size < 1:
                raise ValueError(f"additional_config: fine_grained_tp: {name} must be engines >= 1, got {size!r}")
        return cls(**given)

    @property
    def sizes(self) -> dict[str, int]:
        """Kinds of weights that are split, and over how many engines."""
        return {kind: size for kind, size in dataclasses.asdict(self).items() if size > 1}


@dataclasses.dataclass(frozen=True)
class ServingOptions:
    """What `additional_config` may hold."""

    report_path: str | None = None
    """File that rank 0 keeps writing the run report to, as JSON. None: the report is only logged, at shutdown."""

    report_interval: float = 10.0
    """Seconds between two writes of the report while requests run; 0: only when none is left, and at shutdown."""

    capture_budget_seconds: float = 0.0
    """Seconds that captures may take in all. They go from the largest size down; what no longer fits is served eagerly,
    with one warning a size. 0: no limit."""

    capture_budget_mib: float = 0.0
    """MiB of device memory that captures may take, likewise."""

    trace_dir: str | None = None
    """Folder for a timeline of some steps, a file each rank. None: only /start_profile makes one."""

    trace_steps: tuple[int, int] = (100, 109)
    """The first and the last step of it: steps of the engine after its start, counted from 1."""

    expert_map: str | dict[str, Any] | None = None
    """JSON file, or its content, that says which rank has which experts, more than once where it is worth it
    (docs/eplb.md). None: vLLM's placement."""

    expert_rebalance: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Change that map while the model is served, by what experts got (ExpertRebalance). For example {"interval": 1000,
    "redundant": 4}. Empty: never."""

    fine_grained_tp: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Split weights that every data-parallel engine would have whole (FineGrainedTP). For example {"lm_head": 4,
    "o_proj": 8}. Empty: none."""

    compile: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Options of the `ascend` compile backend (npu_compiler.config), without those of its capture: vLLM captures."""

    @classmethod
    def parse(cls, given: object) -> ServingOptions:
        """Checks `additional_config` and returns it typed.

        Raises:
            ValueError: an option is unknown (the nearest valid one is named) or has a value of the wrong kind.
        """
        if isinstance(given, cls):
            return given
        if not isinstance(given, dict):
            raise ValueError(f"additional_config: expected a JSON object, got {type(given).__name__} {given!r}")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                raise ValueError(f"additional_config: unknown option {name!r}; {_nearest(str(name), known)}")
        options = cls(**given)
        options._check_values()
        for name, needed in (("report_interval", "report_path"), ("trace_steps", "trace_dir")):
            if name in given and not getattr(options, needed):
                raise ValueError(f"additional_config: {name} does nothing without {needed}; add that, or leave it out")
        return options

    @classmethod
    def of(cls, config: VllmConfig) -> ServingOptions:
        """The options of `config`, with what contradicts the rest of it refused.

        Raises:
            ValueError: as `parse`, or compile options together with a mode that compiles nothing.
        """
        from vllm.config import CompilationMode, CUDAGraphMode

        options = cls.parse(config.additional_config)
        eager = config.model_config is not None and config.model_config.enforce_eager
        if options.compile and (eager or config.compilation_config.mode == CompilationMode.NONE):
            cause = "--enforce-eager" if eager else "compilation mode NONE"
            raise ValueError(
                f"additional_config: compile options {sorted(options.compile)} contradict {cause}, which compiles "
                "nothing; drop one of the two"
            )
        on_streams = options.compile.get("multistream") == "auto"
        if on_streams and config.compilation_config.cudagraph_mode == CUDAGraphMode.NONE:
            raise ValueError(
                "additional_config: compile: multistream puts calls on side streams of captured graphs, and "
                "cudagraph_mode NONE captures nothing; leave one of the two out"
            )
        options._refuse_idle(config)
        return options

    def _refuse_idle(self, config: VllmConfig) -> None:
        """Raises ValueError for compile options that would do nothing with the model, or the ranks, that there are."""
        if not self.compile:
            return
        parallel, model = config.parallel_config, config.model_config
        over_ranks = [name for name in OVER_RANKS if self.compile.get(name)]
        if over_ranks and parallel.tensor_parallel_size == 1:
            raise ValueError(
                f"additional_config: compile: {', '.join(over_ranks)} are about sums of tensor parallelism, and with "
                "one rank there are none; add --tensor-parallel-size, or leave them out"
            )
        if "shared_expert_rows" in over_ranks and parallel.data_parallel_size > 1:
            raise ValueError(
                "additional_config: compile: shared_expert_rows and --data-parallel-size exclude each other: layers of "
                "experts gather the tokens of all engines and sum their results up over the ranks, where a shared "
                "expert without a sum of its own saves nothing; leave one of the two out"
            )
        between = [name for name in OF_EXPERTS if self.compile.get(name, "auto") not in ("auto", {})]
        if not between:
            return
        what = f"additional_config: compile: {', '.join(between)} say how tokens get to experts on other ranks, and"
        if model is not None and not model.is_moe:
            raise ValueError(
                f"{what} {model.architecture} has no experts; leave them out, or serve a mixture of experts"
            )
        if not parallel.enable_expert_parallel:
            raise ValueError(
                f"{what} without --enable-expert-parallel each rank has a part of every expert; add that, or leave "
                "them out"
            )
        if parallel.tensor_parallel_size * parallel.data_parallel_size == 1:
            raise ValueError(
                f"{what} with one rank all experts are on it; add --tensor-parallel-size, or leave them out"
            )
        exchanges = [name for name in between if self.compile[name] != "allgather"]
        if exchanges and parallel.data_parallel_size > 1:
            raise ValueError(
                f"additional_config: compile: {', '.join(exchanges)} and --data-parallel-size exclude each other: "
                "layers of experts gather the tokens of all engines, and no part of them is exchanged between ranks; "
                "leave one of the two out"
            )

    def _check_values(self) -> None:
        if self.report_path is not None and not isinstance(self.report_path, str):
            raise ValueError(f"additional_config: report_path must be a file name, got {self.report_path!r}")
        number = isinstance(self.report_interval, (int, float)) and not isinstance(self.report_interval, bool)
        if not number or self.report_interval < 0:
            raise ValueError(
                f"additional_config: report_interval must be seconds >= 0, got {self.report_interval!r}; "
                "0 writes the report only when no request is left, and at shutdown"
            )
        for name in ("capture_budget_seconds", "capture_budget_mib"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(
                    f"additional_config: {name} must be a number >= 0, got {value!r}; 0 sets no limit, and "
                    "cudagraph_mode NONE captures nothing"
                )
        if self.trace_dir is not None and not isinstance(self.trace_dir, str):
            raise ValueError(f"additional_config: trace_dir must be a folder, got {self.trace_dir!r}")
        steps = self.trace_steps
        whole = isinstance(steps, (list, tuple)) and len(steps) == 2 and all(type(step) is int for step in steps)
        if not whole or not 1 <= steps[0] <= steps[1]:
            raise ValueError(
                f"additional_config: trace_steps must be the first and the last step, counted from 1, got {steps!r}"
            )
        if self.expert_map is not None and not isinstance(self.expert_map, (str, dict)):
            raise ValueError(
                f"additional_config: expert_map must be a file name or a JSON object, got {self.expert_map!r}"
            )
        for name in ("expert_rebalance", "fine_grained_tp"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"additional_config: {name} must be a JSON object, got {getattr(self, name)!r}")
        ExpertRebalance.of(self.expert_rebalance)
        FineGrainedTP.of(self.fine_grained_tp)
        if not isinstance(self.compile, dict):
            raise ValueError(f"additional_config: compile must be a JSON object of options, got {self.compile!r}")
        compile_options(self.compile)


def compile_options(given: Mapping[str, Any]) -> Options:
    """The compile backend's options for serving: what was given, without a capture, and with the pass that only a vLLM
    model has use for.

    Raises:
        ValueError: an option is unknown, ill-typed, or describes the backend's own capture.
    """
    captures = [name for name in OF_CAPTURES if name in given]
    if captures:
        raise ValueError(
            f"additional_config: compile: {', '.join(captures)} describe captures of torch.compile's backend, and here "
            "vLLM captures; leave them out, and use --compilation-config's cudagraph_mode and cudagraph_capture_sizes, "
            "or additional_config's capture_budget_seconds and capture_budget_mib"
        )
    try:
        return checked_options({"capture": False, **given, "passes": [*given.get("passes", ()), QKV_ATTENTION]})
    except OptionError as error:
        raise ValueError(f"additional_config: compile: {error}") from error


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"did you mean {close[0]!r}? Valid options: {', '.join(known)}"
