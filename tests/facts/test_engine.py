"""What is proven is true for every value; what can be proven at least is listed."""

from __future__ import annotations

import itertools

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod, PythonMod

from npu_compiler.facts import emit
from npu_compiler.facts.domain import Contradiction, Domain
from npu_compiler.facts.engine import Facts
from npu_compiler.facts.fact import Truth
from npu_compiler.facts.sizes import at_least, divisible, equal, facts_of
from tests.facts.environment import symbolic

S, T = sympy.symbols("s t", integer=True, nonnegative=True)
TRUE, FALSE, UNKNOWN = Truth.TRUE, Truth.FALSE, Truth.UNKNOWN


@pytest.fixture
def eights() -> Facts:
    return Facts([sympy.Eq(Mod(S, 8), 0), S >= 1])


@pytest.mark.parametrize(
    "question",
    [
        sympy.Eq(Mod(S, 4), 0),
        sympy.Eq(Mod(3 * S, 8), 0),
        sympy.Eq(8 * FloorDiv(S, 8), S),
        sympy.Eq(Mod(S + 16, 8), 0),
        S >= 8,
        sympy.Eq(Mod(FloorDiv(S, 4), 2), 0),
        sympy.Eq(FloorDiv(S + 7, 8), FloorDiv(S, 8)),
        sympy.Ne(S, 12),
        sympy.Gt(FloorDiv(S, 8), 0),
    ],
    ids=str,
)
def test_multiples_of_eight(eights: Facts, question: sympy.Basic) -> None:
    assert eights.holds(question).truth is TRUE


@pytest.mark.parametrize(
    ("question", "truth"),
    [
        (sympy.Eq(Mod(S, 16), 0), UNKNOWN),
        (sympy.Eq(Mod(S + 1, 8), 0), FALSE),
        (S < 8, FALSE),
        (S > 8, UNKNOWN),
        (sympy.Eq(S, 20), FALSE),
        (sympy.Eq(2 * S, T), UNKNOWN),
        (sympy.And(S >= 8, sympy.Eq(Mod(S, 16), 0)), UNKNOWN),
        (sympy.Or(S >= 8, sympy.Eq(Mod(S, 16), 0)), TRUE),
        (sympy.Not(sympy.Eq(Mod(S, 16), 0)), UNKNOWN),
    ],
    ids=str,
)
def test_what_does_not_follow(eights: Facts, question: sympy.Basic, truth: Truth) -> None:
    assert eights.holds(question).truth is truth


@pytest.mark.parametrize(
    "question",
    [
        8 * FloorDiv(S + 7, 8) >= S,
        8 * FloorDiv(S, 8) <= S,
        8 * FloorDiv(S + 7, 8) < S + 8,
        sympy.Eq(Mod(8 * FloorDiv(S + 7, 8), 8), 0),
        sympy.Eq(FloorDiv(FloorDiv(S, 4), 2), FloorDiv(S, 8)),
        Mod(S, 8) <= 7,
        Max(S, 4) >= 4,
        Min(S, 4) <= 4,
        S * T >= 0,
    ],
    ids=str,
)
def test_what_needs_no_assumption(question: sympy.Basic) -> None:
    domains = {S: Domain(lower=0), T: Domain(lower=0)}
    assert Facts((), domains).holds(question).truth is TRUE


def test_proof_names_what_it_rests_on(eights: Facts) -> None:
    fact = eights.divides(8, 3 * S)
    assert fact.text == "3*s = 24*k_s + 24 is a multiple of 8; s = 8*k, >= 8"
    assert "leaves 3 when divided by 8" in eights.equal(S, sympy.Integer(13)).text


def test_assumption_about_two_sizes() -> None:
    facts = Facts([S > T, sympy.Eq(S + T, 10)], {S: Domain(lower=0), T: Domain(lower=0)})
    assert facts.holds(S - T >= 1).truth is TRUE
    assert facts.holds(T >= S).truth is FALSE
    assert facts.holds(sympy.Eq(S, 10 - T)).truth is TRUE


def test_bounds_and_single_value() -> None:
    facts = Facts([sympy.Eq(Mod(S, 8), 3), S >= 5, S <= 17])
    assert facts.bounds(2 * S + 1) == (23, 23)
    assert facts.holds(sympy.Eq(S, 11)).truth is TRUE


def test_assumptions_that_exclude_each_other() -> None:
    with pytest.raises(Contradiction, match="nothing is left between"):
        Facts([S >= 5, S <= 4])
    with pytest.raises(Contradiction, match="contradicts"):
        Facts([sympy.Eq(Mod(S, 4), 1), sympy.Eq(Mod(S, 6), 2)])


def test_torch_checks_become_facts() -> None:
    (size, other) = symbolic(48, 7)
    torch._check(size % 8 == 0)
    torch._check(other <= 512)
    assert not statically_known_true(size % 4 == 0), "torch proves it now: say so in docs/facts.md"
    assert divisible(size, 4, "tokens")
    assert divisible(3 * size, 8, "tokens")
    assert equal(8 * (size // 8), size, "tokens")
    assert at_least(size, 8, "tokens")
    assert facts_of(other).bounds(other.node.expr) == (2, 512)
    torch._check(size % 3 == 0)  # learnt after the first question
    assert divisible(size, 24, "tokens")


def test_asserts_about_sizes_found_at_run_time_become_facts() -> None:
    (size,) = symbolic(4)
    found = size.node.shape_env.create_unbacked_symint()
    torch._check(found % 4 == 0)
    torch._check(found >= 2)
    assert divisible(found, 2, "rows")
    assert at_least(found, 4, "rows")


EXPRESSIONS = st.recursive(
    st.sampled_from([S, T]) | st.integers(-9, 9).map(sympy.Integer),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda pair: pair[0] + pair[1]),
        st.tuples(inner, inner).map(lambda pair: pair[0] - pair[1]),
        st.tuples(inner, st.integers(-4, 12)).map(lambda pair: pair[0] * pair[1]),
        st.tuples(inner, inner).map(lambda pair: pair[0] * pair[1]),
        st.tuples(inner, st.integers(1, 9)).map(lambda pair: FloorDiv(pair[0], sympy.Integer(pair[1]))),
        st.tuples(inner, st.integers(1, 9)).map(lambda pair: PythonMod(pair[0], sympy.Integer(pair[1]))),
        st.tuples(inner, inner).map(lambda pair: Max(*pair)),
        st.tuples(inner, inner).map(lambda pair: Min(*pair)),
    ),
    max_leaves=6,
)
RELATIONS = st.sampled_from([sympy.Eq, sympy.Ne, sympy.Ge, sympy.Gt, sympy.Le, sympy.Lt])


@settings(max_examples=600)
@given(
    left=EXPRESSIONS,
    right=EXPRESSIONS,
    relation=RELATIONS,
    modulus=st.integers(1, 8),
    remainder=st.integers(0, 7),
    lower=st.integers(0, 5),
    ordered=st.booleans(),
)
def test_no_proof_has_a_counterexample(
    left: sympy.Expr,
    right: sympy.Expr,
    relation: type,
    modulus: int,
    remainder: int,
    lower: int,
    ordered: bool,
) -> None:
    remainder %= modulus
    assumptions = [lower <= S, S <= 40, T <= 20, sympy.Eq(PythonMod(S, sympy.Integer(modulus)), remainder)]
    facts = Facts([*assumptions, *([T <= S] if ordered else [])], {S: Domain(lower=0), T: Domain(lower=0)})
    truth = facts.holds(relation(left, right)).truth
    if truth is UNKNOWN:
        return
    compare = {sympy.Eq: "__eq__", sympy.Ne: "__ne__", sympy.Ge: "__ge__"}
    compare |= {sympy.Gt: "__gt__", sympy.Le: "__le__", sympy.Lt: "__lt__"}
    members = [s for s in range(lower, 41) if s % modulus == remainder]
    for s, t in itertools.product(members, range(0, 21, 3)):
        if ordered and t > s:
            continue
        a, b = (emit.evaluate(side, {S: s, T: t}) for side in (left, right))
        assert getattr(a, compare[relation])(b) is (truth is TRUE), (s, t, a, b)
