"""Programs that once came out wrong, shrunk. Each names what was wrong."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.properties.compare import check_all_stages
from tests.properties.graphs import Graph, Own, Taken, build
from tests.properties.programs import Input, Program
from tests.properties.stages import Stages

FOUND = {
    # a rule put its operator where its result is first used, at the end, after the write of an input that it reads
    "operand written before the result is used": Program(
        (Input(2),), (("cos", (0,)), ("norm", (1, 0)), ("mul_", (0,))), (2,)
    ),
    "operand is a view of what is written": Program(
        (Input(2), Input(2)), (("left", (0,)), ("right", (1,)), ("norm", (2, 3)), ("mul_", (3,))), (4,)
    ),
    # the same place: reinplace takes it that nothing reads after the writes at the end
    "operand put in place is written before the result is used": Program(
        (Input(2),), (("store_clone", (0, 0)), ("norm", (0, 0)), ("add_", (0,))), (1,)
    ),
    # noop drops the clone, which keeps value and memory apart; reinplace writes the input in place and returned it
    "returned copy of a written input": Program((Input(2),), (("column_", (0,)), ("clone", (0,))), (1,)),
    # the copy that reinplace makes of such an output stood at the end, behind the input's next write
    "returned copy of an input between two writes": Program(
        (Input(2), Input(2)), (("store", (0, 1)), ("clone", (1,)), ("add_", (1,))), (2,)
    ),
    "returned copy of what an operator wrote": Program(
        (Input(2), Input(2)), (("store", (0, 1)), ("clone", (0,)), ("add_scalar", (0,))), (2, 3)
    ),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", FOUND)
def test_program(name: str, dynamic: bool) -> None:
    assert check_all_stages(FOUND[name], dynamic, other_outputs=range(4)).compared >= 4


GRAPHS = {
    # `x.copy_(x.clone())`: noop leaves a copy of x onto itself, which reinplace drops; the spec check missed the write
    "input copied onto itself": Graph((Own(4),), (), writes=((0, 0),)),
    "input copied onto a view that is all of it": Graph(
        (Own(4), ("transposed", (0,)), ("transposed", (1,))), (), writes=((0, 2),)
    ),
    # noop put x in the place of the cat, so that the view of the cat that is returned became a view of x
    "returned view of a cat with nothing": Graph(
        (Own(4), ("cat_nothing", (0,)), ("row_again", (1,)), ("permuted", (2,))), (3,)
    ),
    # reinplace lost sight of what a wrapped operator returns, and wrote it in place although it is read later
    "result of a writing operator is written and read": Graph(
        (Own(4), ("add_one", (0,)), ("accumulate", (1, 1)), ("add_to_row", (3,)), ("addcmul", (3, 3, 2))), (5, 4)
    ),
    # reinplace copied each output of such a memory by itself: two that shared memory did not, and gaps were closed
    "two returned views of what lands in an input": Graph(
        (Own(4), ("add_to_row", (0,)), ("first_row", (1,)), ("later_rows", (1,))), (2, 3), writes=((0, 1),)
    ),
    "returned columns of what lands in an input": Graph(
        (Own(4), ("add_to_row", (0,)), ("even_columns", (1,))), (2,), writes=((0, 1),)
    ),
    # reinplace wrote one half where the other half, returned too, is not read: two outputs came to share memory
    "half written beside a returned half": Graph(
        (Own(4), ("add_one", (0,)), ("split", (1,)), ("slice_scatter", (3, 3))), (4, 2)
    ),
    "half written beside a returned half and returned as a view": Graph(
        (Own(4), ("add_one", (0,)), ("split", (1,)), ("slice_scatter", (3, 3)), ("even_columns", (4,))), (5, 2)
    ),
    # an operand was moved before the result of the match that it is made of
    "weight of a norm made of what it norms": Graph(
        steps=(
            Own(rows=4, columns=8, layout="dense"),
            ("clone", (0,)),
            ("clone", (1,)),
            ("clone", (2,)),
            ("clone", (3,)),
            Taken(fragment="add_layer_norm_miss_1", place=0),
            Taken(fragment="add_layer_norm_miss_1", place=2),
            Taken(fragment="add_layer_norm_miss_1", place=3),
            ("add_layer_norm_miss_1", (5, 5, 6, 7)),
            ("add_rms_norm_miss_3", (5, 5)),
        ),
        outputs=(10,),
        writes=(),
        dtype=torch.float16,
        dynamic=False,
    ),
    # the rotation keeps to the strides that lowering promises; torch_npu's own kernels don't
    "rotation of transposed halves": Graph(
        (
            *(Taken("norm_rope_hugging_face", place) for place in (0, 1, 3, 4)),
            ("norm_rope_hugging_face", (0, 1, 1, 2, 3)),
        ),
        (4, 5),
        dtype=torch.float16,
    ),
    # a reshape that copies was taken for a view: on several streams nobody waited for what it reads
    "reshape that copies": Graph(
        (Own(4), ("cos", (0,)), ("transposed", (1,)), ("flat", (2,)), ("clone", (3,))), outputs=(4, 3)
    ),
    # a reshape of a copy that went was taken for one that copies: its record still named the memory of what went
    "reshape of a copy that went": Graph((Own(4), ("cos", (0,)), ("clone", (1,)), ("flat", (2,))), outputs=(3,)),
    # a part of a join became a contiguous input, and the reshape that had copied the part a view of that input
    "reshape of a part of a join": Graph((Own(4), ("cat_columns", (0, 0)), ("flat", (1,))), outputs=(2,)),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", GRAPHS)
def test_graph(name: str, dynamic: bool) -> None:
    with torch.no_grad():
        stages = Stages(build(dataclasses.replace(GRAPHS[name], dynamic=dynamic)))
        module = stages.prefixes(check=True)
        for entry in stages.changed:
            stages.without(entry)
        stages.planned(module)
    assert stages.compared
