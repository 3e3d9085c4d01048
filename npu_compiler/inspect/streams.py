"""What a plan of streams does to a program: streams are planned when a size is captured, behind all passes."""

from __future__ import annotations

from npu_compiler.inspect.contents import Captured
from npu_compiler.inspect.program import Program

START = "the start"
"""What a side stream waits for that begins with nothing of the main one."""


def planned(program: Program, capture: Captured) -> Program:
    """`program` with the stream of each call and what it waits for, as captured; itself where one stream was used.

    Args:
        program: the final one.
    """
    if not capture.steps:
        return program
    makers = {step.record: step.node for step in capture.steps if step.record}
    placed = {
        step.node: (step.stream, tuple(makers.get(event, START) for event in step.waits)) for step in capture.steps
    }
    joins = tuple(makers.get(event, START) for event in capture.joins)
    calls = []
    for call in program.calls:
        stream, waits = placed.get(call.name, (0, joins if call.op == "output" else ()))
        calls.append(call.model_copy(update={"stream": stream, "waits": waits}) if stream or waits else call)
    return program.model_copy(update={"calls": tuple(calls)})


def said(stream: int, waits: tuple[str, ...]) -> str:
    """Where a call runs, and behind which calls of other streams."""
    where = f"side stream {stream}" if stream else "main stream"
    return f"{where}, behind {', '.join(waits)}" if waits else where


def summary(capture: Captured) -> str:
    """A plan in a line; empty where one stream was used."""
    if not capture.steps:
        return ""
    aside = sum(1 for step in capture.steps if step.stream)
    waits = sum(len(step.waits) for step in capture.steps) + len(capture.joins)
    return f"{aside} of {len(capture.steps)} calls on side streams, {waits} waits; {capture.streams}"
