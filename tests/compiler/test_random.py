"""Random numbers inside a compiled function: the ones that eager draws from the same seed, replay after replay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.compiler.test_capture import Compiled

CALLS = 5
CAPTURED: dict[str, Callable[[Tensor], Tensor]] = {
    "rand_like": lambda x: torch.rand_like(x) + x,
    "two draws": lambda x: torch.randn_like(x) + 10 * torch.randn_like(x),
    "rand": lambda x: torch.rand(3, 5, device=x.device) * 2,
    "randint": lambda x: torch.randint(0, 100, (8,), device=x.device) + x,
    "dropout": lambda x: functional.dropout(x + 1, 0.5, training=True) * 2,
    "uniform_": lambda x: torch.empty_like(x).uniform_(1, 2) + torch.rand_like(x),
    "normal_": lambda x: torch.empty_like(x).normal_(1, 2),
    "random_": lambda x: torch.empty_like(x).random_(0, 9),
    "exponential_": lambda x: torch.empty_like(x).exponential_(),
    "multinomial": lambda x: torch.multinomial(x.abs() + 0.1, 1),
}
# torch_npu draws these with a seed that the host decides; in a capture it refuses all but torch.normal, of which it
# records nothing, so that a replay returns whatever lay in the memory (NormalKernelNpuOpApi.cpp).
UNCAPTURED: dict[str, Callable[[Tensor], Tensor]] = {
    "bernoulli": lambda x: torch.bernoulli(x * 0 + 0.5),
    "randperm": lambda x: torch.randperm(8, device=x.device) + x,
    "normal": lambda x: torch.normal(0.0, 1.0, (8,), device=x.device),
    "normal of tensors": lambda x: torch.normal(x, x + 1),
}


def draws(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """What `function` returns from seed 3 on, and what follows in the generator."""
    x = torch.zeros(8, device="npu")
    torch.npu.manual_seed(3)
    return [function(x).cpu() for _ in range(CALLS)] + [torch.rand(4, device="npu").cpu()]


def assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    for call, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(a, b), f"call {call}: {a} instead of {b}"


@pytest.mark.parametrize("name", CAPTURED)
def test_captured_draws_are_those_of_eager(name: str) -> None:
    expected = draws(CAPTURED[name])
    compiled = Compiled(CAPTURED[name], dynamic=False)
    assert_equal(draws(compiled), expected)
    assert compiled.ledger.replays == CALLS - 1
    assert not torch.equal(expected[1], expected[2]) or name == "multinomial", "a replay has to draw anew"


@pytest.mark.parametrize("name", UNCAPTURED)
def test_draws_that_no_replay_can_repeat_run_uncaptured(name: str) -> None:
    expected = draws(UNCAPTURED[name])
    compiled = Compiled(UNCAPTURED[name], dynamic=False)
    assert_equal(draws(compiled), expected)
    assert not compiled.ledger.captures
    ((reason, count),) = compiled.ledger.uncaptured.items()
    assert "draws random numbers in a way that a captured graph can't repeat" in reason
    assert "test_random.py" in reason
    assert count == CALLS


def test_two_graphs_share_the_generator() -> None:
    """Interleaved replays of two functions, and eager draws between them, go on where the last draw ended."""

    def interleaved(one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor]) -> list[Tensor]:
        x = torch.zeros(8, device="npu")
        torch.npu.manual_seed(11)
        return [f(x).cpu() for _ in range(4) for f in (one, other, torch.rand_like)]

    first, second = CAPTURED["rand_like"], CAPTURED["dropout"]
    expected = interleaved(first, second)
    assert_equal(interleaved(Compiled(first, dynamic=False), Compiled(second, dynamic=False)), expected)


def test_state_saved_and_restored_between_replays() -> None:
    compiled = Compiled(CAPTURED["two draws"], dynamic=False)
    x = torch.zeros(8, device="npu")
    for _ in range(3):
        compiled(x)
    state = torch.npu.get_rng_state()
    first = compiled(x).cpu()
    torch.npu.set_rng_state(state)
    assert torch.equal(compiled(x).cpu(), first)
    torch.npu.set_rng_state(state)
    assert torch.equal(CAPTURED["two draws"](x).cpu(), first)


def test_dropout_in_eval_draws_nothing() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5)).eval()
    expected_module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5)).eval()
    expected_module.load_state_dict(module.state_dict())
    compiled = Compiled(module.to("npu"), dynamic=False)
    torch.npu.manual_seed(5)
    for _ in range(3):
        x = torch.rand(2, 8)
        torch.testing.assert_close(compiled(x.npu()).cpu(), expected_module(x))
    after = torch.rand(4, device="npu").cpu()
    torch.npu.manual_seed(5)
    assert torch.equal(torch.rand(4, device="npu").cpu(), after)


def test_train_and_eval_are_two_graphs() -> None:
    module = torch.nn.Dropout(0.5).to("npu").eval()
    compiled = Compiled(module, dynamic=False)
    x = torch.ones(64, device="npu")
    assert compiled(x).cpu().eq(1).all()
    module.train()
    assert sorted(set(compiled(x).cpu().tolist())) == [0.0, 2.0]
    module.eval()
    assert compiled(x).cpu().eq(1).all()
