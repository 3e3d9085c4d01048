"""Steps in vLLM's metrics and log: how many were replays, and why the others were not.

The worker says what each step was in vLLM's `CUDAGraphStat`, which vLLM carries from worker to front end; the front end
hands it to the stat logger that this package registers (`vllm.stat_logger_plugins`). The stat's `runtime_mode` is text:
"FULL decode", or "NONE other: prefill" with the name of a reason. Now and then it ends with what layers of experts have
counted since the start: tokens that they dropped (docs/token_drop.md), how even their ranks are (docs/eplb.md).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

from prometheus_client import Counter, Gauge
from vllm.compilation.cuda_graph import CUDAGraphStat
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from npu_compiler import reasons
from npu_compiler.backend import Dropped
from npu_compiler.inspect.run import ExpertRows
from npu_compiler.serving.steps import EAGER, Step, StepCounts

logger = init_logger(f"vllm.{__name__}")
DECODE, OTHER = "decode", "other"
COUNTED = "; counted "
OF_ENGINE = ("model_name", "engine")
OF_LAYER = (*OF_ENGINE, "layer")


def stat_of(step: Step, dropped: Sequence[Dropped] = (), experts: Sequence[ExpertRows] = ()) -> CUDAGraphStat:
    """What vLLM carries to the front end of a step, and with it what layers have counted so far."""
    kind = DECODE if step.decode else OTHER
    why = f": {step.reason.name}" if step.reason is not None else ""
    counted = [[dataclasses.astuple(entry) for entry in dropped], [entry.model_dump() for entry in experts]]
    news = COUNTED + json.dumps(counted) if dropped or experts else ""
    return CUDAGraphStat(
        step.tokens, step.padded_tokens, step.padded_tokens - step.tokens, f"{step.mode} {kind}{why}{news}"
    )


def step_of(stat: CUDAGraphStat) -> Step:
    """The step that a stat was made from, without the reason's detail."""
    head, _, why = stat.runtime_mode.partition(COUNTED)[0].partition(": ")
    mode, _, kind = head.partition(" ")
    reason = reasons.named(why) if why else None
    return Step(kind == DECODE, mode, stat.num_unpadded_tokens, stat.num_padded_tokens, reason=reason)


def counted_of(stat: CUDAGraphStat) -> tuple[list[Dropped], list[ExpertRows]]:
    """What stat_of was given of layers of experts."""
    dropped, experts = json.loads(stat.runtime_mode.partition(COUNTED)[2] or "[[], []]")
    return [Dropped(*entry) for entry in dropped], [ExpertRows(**entry) for entry in experts]


class StepMetrics(StatLoggerBase):
    """Prometheus counters of one engine's steps, and a line in the log for those since the last one."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self._labels = (str(vllm_config.model_config.served_model_name), str(engine_index))
        self._engine = engine_index
        self._steps = StepCounts()
        self._dropped: dict[str, Dropped] = {}

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        """Counts the step that these are of."""
        if scheduler_stats is None or scheduler_stats.cudagraph_stats is None:
            return
        step = step_of(scheduler_stats.cudagraph_stats)
        self._steps.add(step)
        dropped, experts = counted_of(scheduler_stats.cudagraph_stats)
        self._count_dropped(dropped)
        for entry in experts:
            for name in ("imbalance", "linear", "moved", "before"):
                _counters()[name].labels(*self._labels, entry.layer).set(getattr(entry, name))
        counters = _counters()
        kind, why = DECODE if step.decode else OTHER, step.reason.name if step.reason is not None else ""
        counters["steps"].labels(*self._labels, kind, step.mode, why).inc()
        if step.mode != EAGER:
            counters["tokens"].labels(*self._labels).inc(step.padded_tokens)
            counters["padding"].labels(*self._labels).inc(step.padded_tokens - step.tokens)

    def _count_dropped(self, now: Sequence[Dropped]) -> None:
        """Adds what came since the last time; a worker that cleared its report counts from 0 again."""
        for entry in now:
            labels, last = (*self._labels, entry.layer), self._dropped.get(entry.layer)
            routed, dropped = (last.routed, last.dropped) if last and last.routed <= entry.routed else (0, 0)
            _counters()["routed"].labels(*labels).inc(entry.routed - routed)
            _counters()["dropped"].labels(*labels).inc(entry.dropped - dropped)
            _counters()["needed"].labels(*labels).set(entry.needed)
            self._dropped[entry.layer] = entry

    def log(self) -> None:
        """Says what the steps since the last call were; nothing where there were none."""
        if self._steps.total:
            logger.info("Engine %03d: %s", self._engine, self._steps.line())
            self._steps.clear()

    def log_engine_initialized(self) -> None:
        """There is nothing to say yet."""


@functools.cache
def _counters() -> dict[str, Any]:
    """The process's counters: prometheus_client takes each name once, and engines differ by label."""
    return {
        "steps": Counter(
            "npu_compiler:steps",
            "Steps by kind (decode, other), by what they ran as (FULL, PIECEWISE, NONE: eager) and, where that is not "
            "FULL, by the reason.",
            (*OF_ENGINE, "kind", "mode", "reason"),
        ),
        "tokens": Counter("npu_compiler:replayed_tokens", "Tokens of replayed steps, padding included.", OF_ENGINE),
        "padding": Counter("npu_compiler:padding_tokens", "Tokens of replayed steps that are padding.", OF_ENGINE),
        "routed": Counter("npu_compiler:routed_rows", "Rows that had an expert, with token_drop.", OF_LAYER),
        "dropped": Counter("npu_compiler:dropped_rows", "Rows that had no room in a buffer.", OF_LAYER),
        "needed": Gauge(
            "npu_compiler:needed_capacity_factor", "The factor at which nothing would have been dropped.", OF_LAYER
        ),
        "imbalance": Gauge(
            "npu_compiler:expert_imbalance", "Rows of the fullest rank of experts, as a multiple of the mean.", OF_LAYER
        ),
        "linear": Gauge(
            "npu_compiler:expert_imbalance_linear", "The same, had vLLM's linear placement been used.", OF_LAYER
        ),
        "before": Gauge(
            "npu_compiler:expert_imbalance_before", "The same, when experts were moved for the last time.", OF_LAYER
        ),
        "moved": Gauge("npu_compiler:moved_experts", "Experts that were moved since the start.", OF_LAYER),
    }
