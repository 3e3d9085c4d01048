"""Lowering a function for the tests of one pass: the functional program that the passes would see."""

from __future__ import annotations

from torch import fx

from npu_compiler.config import Options
from npu_compiler.graph.spec import SpecCheck
from npu_compiler.inspect.check_rule import calls as calls
from npu_compiler.inspect.check_rule import lowered as lowered
from npu_compiler.passes import pipeline
from npu_compiler.passes.record import Pass, PassRecord


def apply(entry: Pass, module: fx.GraphModule) -> PassRecord:
    """Runs one pass as the pipeline does."""
    return pipeline.run_pass(entry, module, Options(), SpecCheck(module))
