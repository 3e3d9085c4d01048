"""How tokens get to the ranks of their experts: the methods, and the table that chooses one.

The table is vllm-ascend's rule (its main branch of August 2026), row by row; the first row that holds for a step
decides. A row holds if its condition is proven: what is not known about a step does not count for it. A row whose
method can't run here is passed over, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from npu_compiler.facts.sizes import Fact, Size, at_least, known

ALLGATHER, ALLTOALL, MC2, FUSED_MC2 = "allgather", "alltoall", "mc2", "fused_mc2"
METHODS: Mapping[str, str] = {
    ALLGATHER: "every rank has all tokens and computes its own experts; a sum over the ranks adds them up",
    ALLTOALL: "each rank sends its tokens' rows to the ranks of their experts, in buffers that always suffice",
    MC2: "CANN's operators send and sort at once (aclnnMoeDistributeDispatch, aclnnMoeDistributeCombine)",
    FUSED_MC2: "one operator for all of it (dispatch_ffn_combine)",
}
MISSING: Mapping[str, str] = {
    FUSED_MC2: "torch_npu has no operator for it: it is one of vllm-ascend's own (dispatch_ffn_combine)",
}
"""Why a method can run nowhere."""
MOST_EXPERTS_EACH, FEWEST_RANKS = 24, 16
"""On A2, of experts on a rank and of ranks: limits of its MC2 operators."""
FUSED_RANKS = 32
"""Most ranks of dispatch_ffn_combine."""
ROWS_EACH = 512
"""Most tokens that a rank may give to MC2's operators."""


@dataclass(frozen=True)
class Step:
    """What is known about a layer of experts in a program.

    Attributes:
        tokens: of all ranks, as the program has it. `most`: no call of the program has more; 0: not known.
        ranks: that the experts are spread over. `experts`: on all of them. `top_k`: of a token.
        soc: the family of chips (graph/soc.py); empty: not known.
        captured: the most tokens that a captured graph has; 0: not known.
    """

    tokens: Size
    most: int
    ranks: int
    experts: int
    top_k: int
    soc: str
    captured: int

    @property
    def capacity(self) -> int:
        """The most tokens of a step for MC2: a full share of the largest graph for each rank; 0: not known."""
        return self.ranks * min(-(-self.captured // self.ranks), ROWS_EACH)

    @property
    def fits(self) -> Fact:
        """Whether a step has no more tokens than MC2 takes."""
        if not self.captured:
            return known(False, "MC2's capacity is not known")
        what = f"tokens, with MC2's capacity of {self.capacity}"
        if self.most:
            return known(self.most <= self.capacity, f"up to {self.most} {what}")
        return at_least(self.capacity, self.tokens, what)


@dataclass(frozen=True)
class Row:
    """One row of the table: on chips of these families (empty: all) and where `holds`, it is `method`."""

    method: str
    why: str
    socs: tuple[str, ...] = ()
    holds: Callable[[Step], Fact] = lambda step: known(True, "always")

    def verdict(self, step: Step) -> Fact:
        """Whether the row decides for this step."""
        if self.socs and step.soc not in self.socs:
            return known(False, f"for {' and '.join(self.socs)}, not for {step.soc or 'an unknown chip'}")
        return self.holds(step)


def _of_a2(step: Step) -> Fact:
    each = -(-step.experts // step.ranks)
    return (
        known(each <= MOST_EXPERTS_EACH, f"{each} experts a rank, more than {MOST_EXPERTS_EACH}")
        & known(step.ranks >= FEWEST_RANKS, f"{step.ranks} ranks, fewer than {FEWEST_RANKS}")
        & step.fits
    )


TABLE: tuple[Row, ...] = (
    Row(ALLGATHER, "310P has no other", ("310P",)),
    Row(MC2, f"A2: at most {MOST_EXPERTS_EACH} experts a rank, {FEWEST_RANKS} ranks or more, it fits", ("A2",), _of_a2),
    Row(ALLGATHER, "A2: what MC2 does not take", ("A2",)),
    Row(MC2, "A3: it fits", ("A3",), lambda step: step.fits),
    Row(ALLTOALL, "A3: what MC2 does not take", ("A3",)),
    Row(MC2, "A5: it fits", ("A5",), lambda step: step.fits),
    Row(
        ALLGATHER,
        "A5: no more ranks than experts a token",
        ("A5",),
        lambda step: known(step.ranks <= step.top_k, f"{step.ranks} ranks, more than {step.top_k} experts a token"),
    ),
    Row(ALLTOALL, "A5: what MC2 does not take", ("A5",)),
    Row(ALLGATHER, "any chip: it needs nothing"),
)
"""The last row always holds. vllm-ascend chooses FUSED_MC2 only where it is asked for, and all-to-all for LoRA, which
is not served here. Where all experts are on one rank nothing is chosen."""


@dataclass(frozen=True)
class Choice:
    """A method, why, and what stood before it in the table with the reason."""

    method: str
    why: str
    passed_over: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.method.upper()} ({'; '.join((self.why, *self.passed_over))})"


def choose(step: Step, asked: str = "", here: Mapping[str, str] = MappingProxyType({})) -> Choice:
    """The method for a step: what was `asked` for, or what the table says.

    Args:
        here: why methods can't be used in this layer.
    """
    if asked:
        return Choice(asked, "asked for")
    missing = {**here, **MISSING}
    passed_over: list[str] = []
    for row in TABLE[:-1]:
        verdict = row.verdict(step)
        if verdict and row.method not in missing:
            return Choice(row.method, row.why, tuple(passed_over))
        if not row.socs or step.soc in row.socs:
            passed_over.append(f"{row.method.upper()} not: {missing[row.method] if verdict else verdict.text}")
    return Choice(TABLE[-1].method, TABLE[-1].why, tuple(passed_over))
