"""Layers of experts for tests: what is routed where, and what is dropped, by the definitions and in plain Python."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from npu_compiler.fusion_kernels.expert_capacity import FINE, parts_of
from npu_compiler.fusion_kernels.expert_exchange import no_expert

HIDDEN = 4
KINDS = ("balanced", "random", "skewed", "one rank")


@dataclass(frozen=True)
class Case:
    """A layer of experts and what it is given."""

    ranks: int
    experts: int
    top_k: int
    tokens: int
    kind: str
    factor: float
    by: str = "score"
    renormalise: bool = False
    ties: bool = False
    number: int = 0

    @property
    def rows(self) -> int:
        """Of each source."""
        return -(-self.tokens // self.ranks)

    @property
    def room(self) -> int:
        most = min(self.top_k, no_expert(self.experts, self.ranks)) * self.rows
        wanted = Fraction(parts_of(self.factor), FINE) * self.rows * self.top_k / self.ranks
        return min(most, -(-wanted.numerator // wanted.denominator))

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        draw = torch.Generator().manual_seed(self.number)
        x = torch.randn(self.tokens, HIDDEN, dtype=torch.float64, generator=draw)
        weights = torch.rand(self.tokens, self.top_k, dtype=torch.float64, generator=draw)
        if self.ties:
            weights = (weights * 3).ceil() / 4
        return x, self._experts(draw), weights

    def _experts(self, draw: torch.Generator) -> Tensor:
        likely = torch.ones(self.tokens, self.experts, dtype=torch.float64)
        if self.kind == "balanced":
            start = torch.arange(self.tokens).unsqueeze(1) * self.top_k
            return ((start + torch.arange(self.top_k)) % self.experts).int()
        if self.kind == "skewed":
            likely = likely / torch.arange(1, self.experts + 1) ** 2
        if self.kind == "one rank":
            likely[:, owned(self, self.number % self.ranks)] = 1e9
        return torch.multinomial(likely, self.top_k, generator=draw).int()


def owned(case: Case, rank: int) -> list[int]:
    """vLLM's linear placement: the first ranks have one more."""
    each, more = divmod(case.experts, case.ranks)
    first = rank * each + min(rank, more)
    return list(range(first, first + each + (rank < more)))


def kept(case: Case, ids: Tensor, weights: Tensor) -> tuple[Tensor, int]:
    """Which of a token's experts get its row, by the definition; and how many don't."""
    stays = torch.zeros(ids.shape, dtype=torch.bool)
    lost = 0
    for start in range(0, case.tokens, case.rows):
        source = range(start, min(start + case.rows, case.tokens))
        for rank in range(case.ranks):
            mine = [(t, j) for t in source for j in range(case.top_k) if int(ids[t, j]) in owned(case, rank)]
            if case.by == "score":
                mine.sort(key=lambda place: -float(weights[place]))
            else:
                mine.sort(key=lambda place: int(ids[place]))
            for place in mine[: case.room]:
                stays[place] = True
            lost += max(0, len(mine) - case.room)
    return stays, lost
