"""Steps in vLLM's metrics and log: how many were replays, and why the others were not.

The worker says what each step was in vLLM's `CUDAGraphStat`, which vLLM carries from worker to front end; the front end
hands it to the stat logger that this package registers (`vllm.stat_logger_plugins`). The stat's `runtime_mode` is text:
"FULL decode", or "NONE other: prefill" with the name of a reason.
"""

from __future__ import annotations

import functools
from typing import Any

from prometheus_client import Counter
from vllm.compilation.cuda_graph import CUDAGraphStat
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from npu_compiler import reasons
from npu_compiler.serving.steps import EAGER, Step, StepCounts

logger = init_logger(f"vllm.{__name__}")
DECODE, OTHER = "decode", "other"
OF_ENGINE = ("model_name", "engine")


def stat_of(step: Step) -> CUDAGraphStat:
    """What vLLM carries to the front end of a step."""
    kind = DECODE if step.decode else OTHER
    why = f": {step.reason.name}" if step.reason is not None else ""
    return CUDAGraphStat(step.tokens, step.padded_tokens, step.padded_tokens - step.tokens, f"{step.mode} {kind}{why}")


def step_of(stat: CUDAGraphStat) -> Step:
    """The step that a stat was made from, without the reason's detail."""
    head, _, why = stat.runtime_mode.partition(": ")
    mode, _, kind = head.partition(" ")
    reason = reasons.named(why) if why else None
    return Step(kind == DECODE, mode, stat.num_unpadded_tokens, stat.num_padded_tokens, reason=reason)


class StepMetrics(StatLoggerBase):
    """Prometheus counters of one engine's steps, and a line in the log for those since the last one."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self._labels = (str(vllm_config.model_config.served_model_name), str(engine_index))
        self._engine = engine_index
        self._steps = StepCounts()

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
        counters = _counters()
        kind, why = DECODE if step.decode else OTHER, step.reason.name if step.reason is not None else ""
        counters["steps"].labels(*self._labels, kind, step.mode, why).inc()
        if step.mode != EAGER:
            counters["tokens"].labels(*self._labels).inc(step.padded_tokens)
            counters["padding"].labels(*self._labels).inc(step.padded_tokens - step.tokens)

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
    }
