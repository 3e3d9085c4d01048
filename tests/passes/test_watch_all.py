"""Every value that the program computes is noted behind its call, and nothing is fused differently because of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from npu_compiler.config import Options
from npu_compiler.fusion_kernels.watched import operator
from npu_compiler.passes import pipeline
from npu_compiler.passes.watch_all import pass_of
from tests.passes.lowered import calls, lowered


def step(x: Tensor, cache: Tensor, rows: Tensor) -> Tensor:
    left, right = x.view(4, 16).chunk(2, dim=-1)
    cache.index_copy_(0, rows, left)
    return nn.functional.silu(left) * right + cache[:4].exp()


def program(watch: tuple[str, ...]) -> list[str]:
    arguments = torch.rand(8, 8), torch.rand(6, 8), torch.arange(4)
    module = lowered(step, *arguments, inference=True).graph
    pipeline.run(module, Options(watch=watch, check=True))
    for node in module.graph.find_nodes(op="call_function", target=operator()):
        assert node.prev in (node.args[0], *node.args[0].users)
    return calls(module)


def test_the_program_is_the_same_but_for_the_notes() -> None:
    plain, noted = program(()), program(("*:nan",))
    note = str(operator())
    assert [call for call in noted if call != note] == plain
    views = ("view", "slice", "chunk", "split")
    computed = [call for call in plain if not any(name in call for name in views)]
    assert noted.count(note) == len(computed) > 0
    assert program(("*:nan", "*:inf")).count(note) == 2 * len(computed)


def test_only_where_it_is_asked_for() -> None:
    assert pass_of(("layers.1:stats",)) is None
    assert pass_of(()) is None
