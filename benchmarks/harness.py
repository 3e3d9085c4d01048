"""How a row is measured: contestants take turns, disturbed rounds are dropped, ratios stay inside a round.

A row compares one *subject* with its *peers*. Every round times each contestant once, in turn, for about
`round_seconds`; a figure is the seconds of one unit of work. Ratios divide two figures of the same round, so that a
slow minute of the machine cancels out. A fixed probe kernel runs before and after every contestant: a round in which
it took more than `PROBE_TOLERANCE` times its best is rejected and repeated, up to `attempts` rounds.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import conditions, cpu
from benchmarks.conditions import PROBE_TOLERANCE


class Missing(RuntimeError):
    """A peer that can't run here; the message says why. It is reported in the table, never left out."""


@dataclasses.dataclass
class Contestant:
    """One way of doing a row's work.

    Attributes:
        name: as printed, for example "npugraph_ex".
        batch: does the work `n` times and returns when it is done, device included. It is timed by the clock, unless it
            returns the seconds that count (CPU seconds of a process of its own, say).
        output: the result to check against the reference, as a CPU tensor; None for work without a result.
        kept: what has to live as long as the contestant (a captured graph knows addresses, it keeps no tensor alive).
        prepare: called before each batch, and not counted.
    """

    name: str
    batch: Callable[[int], float | None]
    output: Callable[[], torch.Tensor] | None = None
    kept: Sequence[object] = ()
    prepare: Callable[[], None] | None = None


Factory = Callable[[], Contestant]
Agree = Callable[[float], float]
"""Makes one number of those that several processes have, once all of them have called it: their largest. Processes that
measure together then go through the same loops and rounds, and a time is that of the slowest one."""


def alone(number: float) -> float:
    """The `Agree` of one process."""
    return number


@dataclasses.dataclass(frozen=True)
class Goal:
    """A first target, attached to the record of `peer`.

    Attributes:
        limit: for the subject itself, in the row's unit.
        faster_than: ratio of the peer's time; for the subject itself, of the best of the row's rivals.
        roof_share: for the subject itself, the time at the row's roof / its time.
        rest: for the subject itself, what it takes beside the row's part, in the row's unit.
    """

    peer: str
    limit: float | None = None
    faster_than: float | None = None
    roof_share: float | None = None
    rest: float | None = None

    def text(self, unit: str) -> str:
        if self.rest is not None:
            return f"<= {self.rest:g} {unit} beside its part"
        if self.limit is not None:
            return f"<= {self.limit:g} {unit}"
        return f"{self.roof_share:.0%} of the roof" if self.roof_share is not None else f">= {self.faster_than:g}x"


@dataclasses.dataclass(frozen=True)
class Row:
    """One row: its contestants by name (the first is the subject) and what is asked of them.

    Attributes:
        name: also the name of the JSON file.
        unit: "ns", "us", "ms" or "s", for the printed and stored figures.
        divisor: units of work in one call of `batch(1)`; figures are per unit.
        roof: the time that the hardware or a published figure allows at best, in `unit`, or None; a function measures
            it here.
        tolerance: allowed absolute difference from the reference's output.
        reference: the contestant whose output is right by definition (plain PyTorch on the CPU).
        rivals: contestants the best of which the subject is to beat.
        kin: contestants that are no peers: the subject in another way or format, or what every peer does too.
        part: a contestant that does a part of the subject's work and nothing else; what the subject takes beside it is
            its `rest`.
        long: takes minutes, so `--quick` leaves it out unless it is asked for by name.
        starts: the work is the start of a process: one of each contestant makes a round.
        threads: compute threads that every contestant may use.
    """

    name: str
    title: str
    unit: str
    contestants: dict[str, Factory]
    reference: str
    goals: tuple[Goal, ...] = ()
    divisor: int = 1
    roof: float | Callable[[], float] | None = None
    tolerance: float = 0.0
    rivals: tuple[str, ...] = ()
    kin: tuple[str, ...] = ()
    part: str | None = None
    long: bool = False
    starts: bool = False
    threads: int = 1

    @property
    def subject(self) -> str:
        return next(iter(self.contestants))

    @property
    def peers(self) -> list[str]:
        """Those that the subject can be slower than."""
        return [name for name in self.contestants if name not in (self.subject, self.part, *self.kin)]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long to measure: `rounds` accepted rounds, at most `attempts`. In a round a contestant does its work `loops`
    times, or as often as fills `round_seconds`.

    As often as fills `uncounted_seconds` goes before it: what is timed stands for one of many in a row, and the
    contestant before left its data in the caches, and those that adapt to what is read over and over adapted to that.
    """

    rounds: int = 9
    round_seconds: float = 0.08
    uncounted_seconds: float = 0.5
    attempts: int = 27
    loops: int | None = None

    @staticmethod
    def quick() -> Settings:
        return Settings(rounds=3, round_seconds=0.02, uncounted_seconds=0.02, attempts=6)

    def uncounted(self, loops: int) -> int:
        """How many loops go before `loops` that count. None where one fills a round, or where their number is set."""
        return 0 if self.loops is not None or loops == 1 else round(loops * self.uncounted_seconds / self.round_seconds)

    @staticmethod
    def of(row: Row, quick: bool) -> Settings:
        if row.starts:
            return Settings(rounds=1, attempts=1, loops=1) if quick else Settings(rounds=3, attempts=5, loops=1)
        return Settings.quick() if quick else Settings()


SCALE = {"ns": 1e9, "us": 1e6, "ms": 1e3, "s": 1.0}


class Probe:
    """A fixed piece of work (a matrix product that fits the first-level cache), timed to notice other programs.

    One reading is the median of a few repetitions: one preempted repetition says nothing, a stolen core shows in most.
    It is read with one thread, whatever the row has: how soon a second one comes depends on who had it before.
    """

    def __init__(self) -> None:
        self.left, self.right = torch.rand(96, 96), torch.rand(96, 96)
        self.best = min(self.read() for _ in range(20))
        self.readings: list[float] = []

    def read(self) -> float:
        seconds = []
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for _ in range(5):
            began = time.perf_counter()
            for _ in range(10):
                torch.mm(self.left, self.right)
            seconds.append(time.perf_counter() - began)
        torch.set_num_threads(threads)
        return statistics.median(seconds)

    def disturbed(self) -> bool:
        """Whether the machine is busy now; a new best reading becomes the standard."""
        now = self.read()
        self.readings.append(now)
        self.best = min(self.best, now)
        return now > PROBE_TOLERANCE * self.best


@dataclasses.dataclass(frozen=True)
class Round:
    """Seconds per loop of each contestant in a round, what the probe took meanwhile, and who had the cores."""

    seconds: dict[str, float]
    probe: list[float]
    use: cpu.Use


@dataclasses.dataclass
class Measured:
    """What the rounds that count came to.

    Attributes:
        seconds: per unit of work of each contestant, one entry per round, in step with each other.
        rejected: disturbed rounds.
        noisy: too few rounds passed the probe, so that disturbed rounds had to be kept.
        conditions: of these rounds (conditions.noted); None without any.
    """

    seconds: dict[str, list[float]]
    rejected: int
    noisy: bool
    conditions: dict[str, float] | None = None


def timed(contestant: Contestant, loops: int, uncounted: int = 0) -> float:
    """Seconds of `loops` times the work, after what goes before them: its own preparation, else `uncounted` loops."""
    if contestant.prepare is not None:
        contestant.prepare()
    elif uncounted > 0:
        contestant.batch(uncounted)
    began = time.perf_counter()
    counted = contestant.batch(loops)
    return time.perf_counter() - began if counted is None else counted


def calibrate(contestant: Contestant, round_seconds: float, agree: Agree = alone) -> int:
    """The number of loops that fills a round, after a warm-up."""
    timed(contestant, 3)
    loops = 1
    while True:
        seconds = agree(timed(contestant, loops))
        if seconds >= round_seconds / 4:
            return max(1, round(loops * round_seconds / seconds))
        loops *= 4


def one_round(
    contestants: Sequence[Contestant], loops: dict[str, int], settings: Settings, probe: Probe, agree: Agree = alone
) -> tuple[dict[str, float], bool]:
    """Times every contestant once; returns the seconds per loop, and whether the probe noticed another program."""
    seconds, disturbed = {}, agree(probe.disturbed()) > 0
    for contestant in contestants:
        count = loops[contestant.name]
        seconds[contestant.name] = agree(timed(contestant, count, settings.uncounted(count))) / count
        disturbed = agree(probe.disturbed()) > 0 or disturbed
    return seconds, disturbed


def measure(contestants: Sequence[Contestant], divisor: int, settings: Settings, agree: Agree = alone) -> Measured:
    """Runs interleaved rounds until enough are undisturbed, or `settings.attempts` have been run."""
    loops = {one.name: settings.loops or calibrate(one, settings.round_seconds, agree) for one in contestants}
    probe = Probe()
    accepted: list[Round] = []
    disturbed_rounds: list[Round] = []
    for attempt in range(settings.attempts):
        # Turn the order, so that nobody always runs behind the same neighbour.
        shift = attempt % len(contestants)
        order = [*contestants[shift:], *contestants[:shift]]
        before, read = cpu.Use.until_now(), len(probe.readings)
        seconds, disturbed = one_round(order, loops, settings, probe, agree)
        found = Round(seconds, probe.readings[read:], cpu.Use.until_now().since(before))
        (disturbed_rounds if disturbed else accepted).append(found)
        if len(accepted) >= settings.rounds:
            break
    noisy = len(accepted) < settings.rounds
    kept = accepted + disturbed_rounds[: settings.rounds - len(accepted)] if noisy else accepted
    columns = {c.name: [round_.seconds[c.name] / divisor for round_ in kept] for c in contestants}
    typical = statistics.median(reading for round_ in kept for reading in round_.probe)
    seen = conditions.noted(cpu.Use.sum(round_.use for round_ in kept), typical)
    return Measured(columns, len(disturbed_rounds), noisy, seen)


def check_outputs(contestants: Sequence[Contestant], reference: str, tolerance: float) -> dict[str, float | None]:
    """The largest absolute difference of each contestant from the reference.

    Raises:
        AssertionError: a difference above `tolerance`, or another shape.
    """
    by_name = {contestant.name: contestant for contestant in contestants}
    if reference not in by_name or by_name[reference].output is None:
        return dict.fromkeys(by_name)
    right = by_name[reference].output().double()  # type: ignore[misc]
    errors: dict[str, float | None] = {}
    for name, contestant in by_name.items():
        if contestant.output is None:
            errors[name] = None
            continue
        given = contestant.output().double()
        assert given.shape == right.shape, (
            f"{name}: output of shape {tuple(given.shape)}, expected {tuple(right.shape)}"
        )
        error = float((given - right).abs().max())
        assert error <= tolerance, f"{name}: differs from {reference} by {error:g}, allowed is {tolerance:g}"
        errors[name] = error
    return errors


def build(row: Row) -> tuple[list[Contestant], dict[str, str]]:
    """Sets up every contestant; those that can't run here are returned with their reason.

    The last one is set up first: `npugraphs` and `npugraph_ex` load torch_npu's Inductor, which changes the lowering
    of the plain CPU for the whole process, so that what AOTInductor writes then doesn't compile.
    """
    ready: list[Contestant] = []
    missing: dict[str, str] = {}
    for name, factory in reversed(row.contestants.items()):
        try:
            ready.insert(0, factory())
        except Missing as reason:
            missing[name] = str(reason)
    return ready, missing


def records(
    row: Row,
    measured: Measured,
    errors: dict[str, float | None],
    missing: dict[str, str],
    roof: float | None = None,
) -> list[dict[str, Any]]:
    """The row as JSON objects, one per peer (the subject is its own peer, with ratio 1).

    `ratio` is peer / subject, the median over rounds of the ratio within a round: above 1 the subject is faster. The
    subject's record names the rival with the least ratio as `best_rival`, and that ratio as `best_ratio`; `rest` is its
    time less that of the row's part, the median over rounds of the difference within a round.
    """
    scale, subject = SCALE[row.unit], measured.seconds.get(row.subject)
    out: list[dict[str, Any]] = []
    for name in row.contestants:
        goals = [goal for goal in row.goals if goal.peer == name]
        record: dict[str, Any] = {"row": row.name, "subject": row.subject, "peer": name, "unit": row.unit}
        keys = ("median", "min", "max", "ratio", "ratio_min", "ratio_max", "max_abs_error")
        record.update(dict.fromkeys(keys))
        record.update(best_rival=None, best_ratio=None, rest=None, rest_min=None, rest_max=None)
        record.update(roof=roof, goal="; ".join(goal.text(row.unit) for goal in goals) or None, met=None)
        record.update(missing=missing.get(name), rounds=0, rejected=measured.rejected, noisy=measured.noisy)
        record.update(conditions=measured.conditions)
        if name in measured.seconds:
            seconds = measured.seconds[name]
            figures = [value * scale for value in seconds]
            record.update(median=statistics.median(figures), min=min(figures), max=max(figures), rounds=len(figures))
            record["max_abs_error"] = errors.get(name)
            if subject is not None:
                ratios = [peer / own for peer, own in zip(seconds, subject, strict=True)]
                record.update(ratio=statistics.median(ratios), ratio_min=min(ratios), ratio_max=max(ratios))
        out.append(record)
    rivals = [record for record in out if record["peer"] in row.rivals and record["ratio"] is not None]
    if rivals:
        best = min(rivals, key=lambda record: record["ratio"])
        out[0].update(best_rival=best["peer"], best_ratio=best["ratio"])
    if subject is not None and row.part in measured.seconds:
        rests = [(whole - part) * scale for whole, part in zip(subject, measured.seconds[row.part], strict=True)]
        out[0].update(rest=statistics.median(rests), rest_min=min(rests), rest_max=max(rests))
    for record in out:
        goals = [goal for goal in row.goals if goal.peer == record["peer"]]
        if goals and record["median"] is not None:
            record["met"] = all(_met(goal, record) for goal in goals)
    return out


def _met(goal: Goal, record: dict[str, Any]) -> bool:
    if goal.limit is not None:
        return bool(record["median"] <= goal.limit)
    if goal.roof_share is not None:
        return record["roof"] is not None and bool(record["roof"] / record["median"] >= goal.roof_share)
    if goal.rest is not None:
        return record["rest"] is not None and bool(record["rest"] <= goal.rest)
    ratio = record["best_ratio"] if record["peer"] == record["subject"] else record["ratio"]
    return ratio is not None and bool(ratio >= (goal.faster_than or 0.0))


def run(row: Row, settings: Settings, agree: Agree = alone) -> list[dict[str, Any]]:
    """Builds, checks and measures the contestants of `row`.

    Raises:
        AssertionError: a contestant computes something else than the reference.
    """
    torch.set_num_threads(row.threads)
    roof = row.roof() if callable(row.roof) else row.roof
    contestants, missing = build(row)
    if not contestants:
        return records(row, Measured({}, 0, False), {}, missing, roof)
    check_outputs(contestants, row.reference, row.tolerance)
    measured = measure(contestants, row.divisor, settings, agree)
    # Once more: a replay that drifts or reads memory given back since shows only now.
    errors = check_outputs(contestants, row.reference, row.tolerance)
    return records(row, measured, errors, missing, roof)


def number(value: float | None) -> str:
    """A figure as it is printed: three digits, or all in front of the point."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
