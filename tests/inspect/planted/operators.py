"""Operators that are wrong in ways that their schemas hide."""

from __future__ import annotations

import os

import torch
from torch import Tensor

LIBRARY = torch.library.Library("planted", "FRAGMENT")
LAST: dict[tuple[int, ...], Tensor] = {}


def _define(name: str, run: object) -> None:
    LIBRARY.define(f"{name}(Tensor x) -> Tensor")
    LIBRARY.impl(name, run, "PrivateUse1")
    LIBRARY.impl(name, torch.empty_like, "Meta")


def kept_tanh(x: Tensor) -> Tensor:
    """tanh; for memory that it has seen before, what it gave the last time."""
    key = (x.data_ptr(), *x.shape)
    if key not in LAST:
        LAST[key] = x.tanh()
    return LAST[key].clone()


def tripled(x: Tensor) -> Tensor:
    """3 x, for which it writes x and says nothing of it: nobody waits until others have read x."""
    x.mul_(3.0)
    return x.clone()


def read_back(x: Tensor) -> Tensor:
    """cos, for which it looks at a value on the host: no captured graph can."""
    return x.cos() if float(x.flatten()[0]) < float("inf") else x


def ends(x: Tensor) -> Tensor:
    """Ends the process, as an access out of bounds may."""
    os.abort()


_define("kept_tanh", kept_tanh)
_define("tripled", tripled)
_define("read_back", read_back)
_define("ends", ends)
