"""CPU seconds of a measurement: what a machine that others use as well leaves comparable."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import os
import resource
import threading
import time
from collections.abc import Iterable

import psutil

POOL = "torch/_inductor/compile_worker"
"""Part of the command line of Inductor's pool of compile workers."""
TICK_S = 0.01
LOADED = 0.1
"""Above this share of the machine's cores that other programs had, times are rough."""


@dataclasses.dataclass(frozen=True)
class Use:
    """Who used the cores for a while.

    Attributes:
        seconds: by the clock.
        all: CPU seconds of all programs of the machine, and those that its host gave to other machines (steal).
        own: CPU seconds of this process, and of its children that have ended and were waited for.
    """

    seconds: float
    all: float
    own: float

    @staticmethod
    def until_now() -> Use:
        """Since some moment in the past, the same one in each call."""
        machine = psutil.cpu_times()  # guests are in user and nice
        busy = machine.user + machine.nice + machine.system + machine.irq + machine.softirq + machine.steal
        own = os.times()
        return Use(time.perf_counter(), busy, own.user + own.system + own.children_user + own.children_system)

    def since(self, before: Use) -> Use:
        return Use(self.seconds - before.seconds, self.all - before.all, self.own - before.own)

    @staticmethod
    def sum(uses: Iterable[Use]) -> Use:
        parts = [(use.seconds, use.all, use.own) for use in uses]
        return Use(*map(sum, zip(*parts, strict=True)))

    @property
    def others(self) -> float:
        """The share of the machine's cores that others had. The kernel counts ticks of 10 ms: rough below a second."""
        return max(0.0, self.all - self.own) / (self.seconds * (os.cpu_count() or 1))


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


class Clock:
    """CPU seconds of this process over time, for stretches of time that are known only when they have ended.

    Used as a context: it notes the CPU seconds all the while.
    """

    def __init__(self) -> None:
        self._times: list[float] = []
        self._cpu: list[float] = []
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Clock:
        self._sampler.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._stop.set()
        self._sampler.join()
        self._note()

    def between(self, start: float, end: float) -> float:
        """CPU seconds from one moment to another (time.perf_counter()), both of them within the context."""
        return self._at(end) - self._at(start)

    def _sample(self) -> None:
        self._note()
        while not self._stop.wait(TICK_S):
            self._note()

    def _note(self) -> None:
        with self._lock:
            self._times.append(time.perf_counter())
            self._cpu.append(time.process_time())

    def _at(self, moment: float) -> float:
        """The CPU seconds at a moment that has been."""
        with self._lock:
            return self._cpu[max(0, bisect.bisect(self._times, moment) - 1)]
