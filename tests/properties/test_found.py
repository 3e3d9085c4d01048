"""Programs that once came out wrong, shrunk. Each names what was wrong."""

from __future__ import annotations

import pytest

from tests.properties.compare import check_all_stages
from tests.properties.programs import Input, Program

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
