"""CPU seconds of a measurement: what a machine that others use as well leaves comparable."""

from __future__ import annotations

import bisect
import contextlib
import logging
import resource
import threading
import time
from collections.abc import Iterator

import psutil

POOL = "torch/_inductor/compile_worker"
"""Part of the command line of Inductor's pool of compile workers."""
TICK_S = 0.01


def spent() -> float:
    """User and system seconds of this process, all its threads, and of its children, living or gone, with theirs.

    A pool of compile workers that has started no worker is idle, and does not count: all it did was to start.
    """
    gone = resource.getrusage(resource.RUSAGE_CHILDREN)
    living = sum(map(_of_child, psutil.Process().children()))
    return time.process_time() + gone.ru_utime + gone.ru_stime + living


def _of_child(child: psutil.Process) -> float:
    with contextlib.suppress(psutil.NoSuchProcess):
        times, below = child.cpu_times(), child.children()
        worked = below or times.children_user + times.children_system
        if any(POOL in part for part in child.cmdline()) and not worked:
            return 0.0
        return float(sum(times[:4])) + sum(map(_of_child, below))
    return 0.0


class Clock(logging.Handler):
    """CPU seconds of stretches of time that vLLM's log tells of only when they have ended.

    Used as a context: `seconds` are those of the stretches that `ended` within it.

    Args:
        name: the logger, whose messages about the end of a stretch contain `ending`.
    """

    def __init__(self, name: str, ending: str) -> None:
        super().__init__(logging.INFO)
        self._logger, self._ending = logging.getLogger(name), ending
        self._times: list[float] = []
        self._cpu: list[float] = []
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.seconds = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[Clock]:
        """Notes the CPU seconds of this process all the while."""
        sampler = threading.Thread(target=self._sample, daemon=True)
        level, propagate = self._logger.level, self._logger.propagate
        self._logger.setLevel(logging.INFO)
        self._logger.propagate = False
        self._logger.addHandler(self)
        sampler.start()
        try:
            yield self
        finally:
            self._stop.set()
            sampler.join()
            self._logger.removeHandler(self)
            self._logger.setLevel(level)
            self._logger.propagate = propagate

    def emit(self, record: logging.LogRecord) -> None:
        """Counts the stretch that a message is about, whose last argument is its length in seconds."""
        if self._ending in str(record.msg) and isinstance(record.args, tuple):
            self.seconds += time.process_time() - self._at(time.perf_counter() - float(str(record.args[-1])))

    def _sample(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                self._times.append(time.perf_counter())
                self._cpu.append(time.process_time())
            self._stop.wait(TICK_S)

    def _at(self, moment: float) -> float:
        """The CPU seconds at a moment that has been."""
        with self._lock:
            return self._cpu[max(0, bisect.bisect(self._times, moment) - 1)]
