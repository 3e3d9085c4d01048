"""Handing the rewritten program to the wheel's own capture, `torch_npu.dynamo.npugraph_ex`.

It brings what only the vendor has (static kernel compilation, super kernels on a card); lowering and passes stay ours.
Its import installs signal and exit handlers, so it is imported on demand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from npu_compiler.errors import OptionError


def serve(
    program: fx.GraphModule, inputs: Sequence[Any], stable: Sequence[int], options: Mapping[str, Any]
) -> Callable[..., Any]:
    """A callable that captures and replays `program`.

    Args:
        inputs: the program's fake inputs. `stable`: positions of those with lasting addresses.
        options: npugraph_ex's own, such as {"static_kernel_compile": True}.

    Raises:
        OptionError: npugraph_ex does not know an option.
    """
    import torch_npu.dynamo.npugraph_ex  # noqa: F401  makes `npugraph_ex` importable
    from npugraph_ex import CompilerConfig, compile_fx

    config = CompilerConfig()
    for name in options:
        if not hasattr(config, name):
            raise OptionError(
                f"option npugraph_ex names {name!r}, which npugraph_ex does not know",
                rule="the entries are options of torch.compile(backend='npugraph_ex')",
                fix=f"known: {', '.join(sorted(key for key in vars(config) if not key.startswith('_')))}",
            )
    for position in stable:
        if isinstance(inputs[position], torch.Tensor):
            inputs[position]._torchair_is_parameter = True  # how npugraph_ex is told what need not be copied in
    return compile_fx(program, inputs, dict(options))
