"""What CANN's operators that dispatch and combine experts' rows take, by family of chips.

From the pages of aclnnMoeDistributeDispatchV2 and aclnnMoeDistributeCombineV2 (ops-transformer). The host runtime
refuses the same (runtime/aclnn/expert_exchange_checks.cpp); both pages name A2 and A3 only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

DTYPES = (torch.float16, torch.bfloat16)
MOST_CHOICES = 16
"""Experts of a token."""
BUFFER_MIB = 200
"""Of a communicator, where HCCL_BUFFSIZE says nothing."""
MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Of one family of chips.

    Attributes:
        ranks: how many there may be. `tokens`: of a rank. `experts`: of all ranks. `each`: of a rank.
        hidden: least, most and step of the elements of a row.
    """

    ranks: tuple[int, ...] | range
    tokens: int
    hidden: range
    experts: int
    each: int

    def buffer(self, ranks: int, experts: int, top_k: int, tokens: int, hidden: int) -> int:
        """Bytes of HCCL's buffer that a dispatch of so many tokens of a rank needs, the larger need of the two."""
        each = experts // ranks
        if isinstance(self.ranks, tuple):  # A2 sends to all ranks at once
            return 2 * (tokens * ranks * min(each, top_k) * hidden * 2 + 2 * MIB)
        row = _aligned(_aligned(2 * hidden, 32) + 64, 512)
        return 2 * (each * tokens * ranks * row + (top_k + 1) * tokens * _aligned(2 * hidden, 512))


LIMITS: Mapping[str, Limits] = {
    "A2": Limits((16, 32, 64, 128, 256), 256, range(32, 7169, 32), 512, 24),
    "A3": Limits(range(2, 769), 512, range(1024, 8193), 1024, 1024),
}


def refusal(soc: str, ranks: int, experts: int, top_k: int, tokens: int, hidden: int, dtype: torch.dtype) -> str:
    """Why the operators don't take a layer; empty if they do.

    Args:
        soc: the family of chips. `tokens`: the most of a rank. `hidden`, `dtype`: of a row.
    """
    limits = LIMITS.get(soc)
    if limits is None:
        return f"the operators are for {' and '.join(LIMITS)}, not for {soc or 'an unknown chip'}"
    if ranks not in limits.ranks:
        return f"{ranks} ranks, {soc} takes {_text(limits.ranks)}"
    if dtype not in DTYPES:
        return f"rows are {dtype}, float16 and bfloat16 are taken"
    if hidden not in limits.hidden:
        return f"rows of {hidden}, {soc} takes {_text(limits.hidden)}"
    if not 0 < tokens <= limits.tokens:
        return f"up to {tokens} tokens a rank, {soc} takes {limits.tokens}"
    if not 0 < top_k <= min(MOST_CHOICES, experts):
        return f"{top_k} experts a token, {MOST_CHOICES} are taken"
    if experts % ranks:
        return f"{experts} experts can't be spread evenly over {ranks} ranks"
    if experts > limits.experts or experts // ranks > limits.each:
        return f"{experts} experts, {soc} takes {limits.experts}, and {limits.each} a rank"
    need, there = -(-limits.buffer(ranks, experts, top_k, tokens, hidden) // MIB), buffer_mib()
    return f"HCCL_BUFFSIZE is {there} (MiB), {need} are needed" if need > there else ""


def buffer_mib() -> int:
    """What HCCL_BUFFSIZE says, MiB."""
    given = os.environ.get("HCCL_BUFFSIZE", "")
    return int(given) if given.isdecimal() else BUFFER_MIB


def _aligned(value: int, step: int) -> int:
    return -(-value // step) * step


def _text(numbers: tuple[int, ...] | range) -> str:
    if isinstance(numbers, tuple):
        return ", ".join(map(str, numbers))
    steps = f" in steps of {numbers.step}" if numbers.step > 1 else ""
    return f"{numbers.start} to {numbers[-1]}{steps}"
