"""docs/parallel_pairs.md: each pair and what is known of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tests.serving.pairs.features import FEATURES, KINDS
from tests.serving.pairs.plan import Pair, Start, pairs, pairs_of

EQUAL, NOT_RUN = "equal", "not run"
Row = Mapping[str, Any]

HEAD = """# Features of several ranks, pair by pair

Written by `python -m tests.serving.pairs` (`make pairs`); its `--help` says how to run a part, or go on.

Each pair of features was served together with vLLM on the host runtime, ranks being processes; nothing here ran on
Ascend cards. A small Qwen3 (dense), Qwen3-MoE or Qwen2-MoE (with a shared expert) answers 8 prompts of 3 to 300 tokens
at once, and the tokens have to be those of transformers, in float32 on the CPU. Features that need half precision run
in float16, on prompts whose answers no rounding can change: transformers chooses each token by a margin, and the same
one in float16. A start that gives the right tokens counts only if the ranks show that each of its features did
something: steps that were replayed, passes that fired, experts and weights as they lie, streams of the captured
graphs.

- **equal**: the tokens are equal. The number is that of the start, below, whose features were all on together.
- **refused**: start-up refuses the pair, for the reason given; a test holds it to that.
- a reason: it does not work.
- **not run**: nothing is known.

Two choices of one thing (graph modes, numbers of ranks of one kind) are no pair. What has 4 ranks by itself is tried
with some features only. Where no graph mode is named, it is FULL_DECODE_ONLY. The model has 2 layers, with
`pipeline_parallel=4` it has 4, and with `layer_sharding` 4 a stage. The model with a shared expert has the pairs of
what works on that. `token_drop` is with room for all rows, where it is exact. `expert_communication=mc2` is on the
host runtime's A3, with 1024 columns; `matmul_all_reduce`, which A2 has alone, is not tried beside it.
`fine_grained_tp` splits LM head, output projections and embedding over two engines of one rank each, and is tried with
what those can have. With `sequence_parallel`, which leaves no sums over the ranks, `dual_batch_overlap` is for steps of
up to 15 tokens and `sequence_parallel` for those from 16 on; so is `attention_exchange` in a mixture of experts. In the
table of starts, `compiler` begins its fingerprint: starts with different ones were made with different states of the
compiler, and `--again stale` makes those anew that are not of the present one.
"""


TITLES = dict(zip(KINDS, ("Dense", "Mixture of experts", "Mixture with a shared expert"), strict=True))


def states(rows: Sequence[Row], refusals: Mapping[Pair, str]) -> dict[Pair, str]:
    """What is known of each pair: refused, equal in a start with more features, wrong by itself, or nothing."""
    found = dict.fromkeys(pairs(), NOT_RUN)
    for row in rows:
        start = Start.parse(row["start"])
        tried = pairs_of(start)
        for pair in tried:
            if row["outcome"] == EQUAL:
                found[pair] = EQUAL
            elif pair.start == start and found[pair] != EQUAL:
                found[pair] = f"{row['outcome']}: {row['reason']}"
    return found | {pair: f"refused: {reason}" for pair, reason in refusals.items()}


def page(rows: Sequence[Row], refusals: Mapping[Pair, str], compiler: str) -> str:
    """The page in Markdown."""
    found, equal = states(rows, refusals), [row for row in rows if row["outcome"] == EQUAL]
    numbers = {row["start"]: number for number, row in enumerate(equal, start=1)}
    lines = [HEAD]
    counts = Counter(state.partition(":")[0] for state in found.values())
    summary = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    lines += [f"{len(found)} pairs: {summary}.", ""]
    for kind in KINDS:
        lines += [f"## {TITLES[kind]}", ""]
        lines += _table(kind, {pair: state for pair, state in found.items() if pair.kind == kind}, numbers)
        lines.append("")
    lines += _reasons(found)
    now = sum(row["compiler"] == compiler for row in equal)
    lines += [
        "## Starts",
        "",
        f"{now} of {len(equal)} were made with the compiler as it was when this page was written (`{compiler[:6]}`).",
        "",
    ]
    lines += ["| number | features | seconds | compiler |", "| --- | --- | --- | --- |"]
    for row in equal:
        cells = (numbers[row["start"]], row["start"], f"{row['seconds']:.0f}", row["compiler"][:6] or "not noted")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, ""])


def _table(kind: str, states: Mapping[Pair, str], numbers: Mapping[str, int]) -> list[str]:
    names = [feature.name for feature in FEATURES if kind in feature.kinds]
    columns = [name for name in names[1:] if any(pair.right == name for pair in states)]
    lines = ["| | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    starts = {pair: number for text, number in numbers.items() for pair in pairs_of(Start.parse(text))}
    for left in names:
        cells = [_cell(states.get(Pair(kind, left, right)), starts.get(Pair(kind, left, right))) for right in columns]
        if any(cells):
            lines.append(f"| {left} | " + " | ".join(cells) + " |")
    return lines


def _cell(state: str | None, start: int | None) -> str:
    if state is None:
        return ""
    return f"equal {start}" if state == EQUAL else state.partition(":")[0]


def _reasons(states: Mapping[Pair, str]) -> list[str]:
    """What start-up says to refused pairs, and what is wrong with others: one line a reason."""
    why: dict[str, list[Pair]] = {}
    for pair, state in states.items():
        if state not in (EQUAL, NOT_RUN):
            why.setdefault(state, []).append(pair)
    lines = ["## Reasons", ""] if why else []
    for state, found in sorted(why.items()):
        names = "; ".join(dict.fromkeys(f"{pair.left} with {pair.right} ({pair.kind})" for pair in found))
        lines.append(f"- {names}: {state}")
    return [*lines, ""] if why else []
