"""Which family of Ascend chips this process computes on."""

from __future__ import annotations

import torch_npu

FAMILIES: dict[str, range] = {
    "310P": range(200, 206),
    "A2": range(220, 226),
    "A3": range(250, 256),
    "A5": range(260, 270),
}
"""Products by what torch_npu gives as the version of a chip (torch_npu/csrc/core/npu/NpuVariables.h)."""


def family() -> str:
    """One of FAMILIES; empty where the chip is another one."""
    version = torch_npu.npu.get_soc_version()
    return next((name for name, versions in FAMILIES.items() if version in versions), "")
