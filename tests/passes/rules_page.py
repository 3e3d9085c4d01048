"""docs/rules.md from the passes and rules themselves: `python -m tests.passes.rules_page` writes it anew."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from types import ModuleType

from npu_compiler.passes import pipeline
from npu_compiler.passes.record import Pass
from npu_compiler.passes.rewrite import Rule

PAGE = Path(__file__).parents[2] / "docs" / "rules.md"
HEAD = """# Every pass and every rule

The passes in the order of their first run, each with the programs of its rules before and after, and what a rule is
left out for. The page is made from the rules' own examples and near misses (`python -m tests.passes.rules_page`), which
`tests/passes/test_rules.py` runs: each program in each dtype against float64, for fixed and for dynamic rows. How to
write a rule: [passes.md](passes.md).

```python
import torch
from torch import Tensor
from torch.nn.functional import gelu
```
"""


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *(_of_pass(entry) for entry in dict.fromkeys(_distinct()))])


def _distinct() -> list[Pass]:
    first = {entry.name: entry for entry in reversed(pipeline.PASSES)}
    return [entry for entry in pipeline.PASSES if first[entry.name] is entry and entry.name != pipeline.USER_RULES]


def _of_pass(entry: Pass) -> str:
    module = importlib.import_module(f"npu_compiler.passes.{entry.name}")
    parts = [f"## `{entry.name}`", (module.__doc__ or "").strip().replace("::\n", ":\n")]
    return "\n\n".join([*parts, *(_of_rule(rule, module) for rule in entry.rules)]) + "\n"


def _of_rule(rule: Rule, module: ModuleType) -> str:
    program = inspect.getsource(rule.reference).strip()
    after = ", ".join(f"`{name}`" for name in rule.after or (f"npu_fused.{rule.operator}.default",))
    reasons = dict.fromkeys(miss.reason for miss in rule.near_misses if miss.reason)
    parts = [f"### `{rule.name}`", f"```python\n{program}\n```", f"The operators afterwards: {after}."]
    if reasons:
        parts.append("\n".join(["Left out, for example:\n", *(f"* {reason}" for reason in reasons)]))
    return "\n\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
