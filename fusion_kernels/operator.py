"""What a fused operator is, and how one of its providers is chosen."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from npu_compiler.fusion_kernels import triton_driver


@dataclass(frozen=True)
class Provider:
    """One way to compute a fused operator.

    Attributes:
        name: for reports.
        run: takes the operator's arguments and returns its result.
        needs: what it calls: operators by name (such as "npu::npu_rms_norm"), each with a kernel for the tensors, or
            "triton", with a driver for them.
        refuses: why it can't take these arguments (a documented limit of what it calls); empty if it can.
    """

    name: str
    run: Callable[..., Any]
    needs: tuple[str, ...] = ()
    refuses: Callable[..., str] = lambda *args: ""


@dataclass(frozen=True)
class FusedOperator:
    """A fused operator of the namespace npu_fused.

    Attributes:
        schema: name and signature as torch.library takes them; nothing is written and nothing aliased.
        reference: the meaning, in plain PyTorch; runs on any device, float64 included.
        fake: shapes, dtypes and strides of the result, from fake tensors.
        providers: tried in this order: operators of CANN, those of a custom operator library, a Triton kernel,
            compositions of CANN's operators; the last, a composition of PyTorch's, takes everything.
        example: makes arguments for a test, given a dtype.
    """

    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    providers: tuple[Provider, ...]
    example: Callable[[torch.dtype], Sequence[Any]]

    @property
    def name(self) -> str:
        """The name without the namespace."""
        return self.schema.split("(")[0]

    def provider(self, *args: Any) -> Provider:
        """The provider that takes these arguments."""
        for candidate in self.providers:
            if not missing_kernel(candidate, args) and not candidate.refuses(*args):
                return candidate
        raise RuntimeError(f"npu_fused::{self.name}: no provider takes these arguments")  # the last one always does

    def passed_over(self, *args: Any) -> list[str]:
        """The providers before the one that takes these arguments, each with the reason: what the report says."""
        taken = self.provider(*args)
        before = self.providers[: self.providers.index(taken)]
        return [f"{entry.name}: {missing_kernel(entry, args) or entry.refuses(*args)}" for entry in before]

    def __call__(self, *args: Any) -> Any:
        return self.provider(*args).run(*args)


def missing_kernel(provider: Provider, args: Sequence[Any]) -> str:
    """Which operator that `provider` calls has no kernel for these tensors; empty if all have one."""
    device = next(_tensors(args)).device.type
    reasons = (_missing(name, device) for name in provider.needs)
    return next(filter(None, reasons), "")


def _tensors(args: Sequence[Any]) -> Iterator[torch.Tensor]:
    """The tensors among arguments, those in lists too."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from _tensors(arg)


def _missing(name: str, device: str) -> str:
    if name == triton_driver.PACKAGE:
        return triton_driver.missing(device)
    backend = torch._C._dispatch_key_for_device(device)  # under which a kernel for these tensors would be registered
    return "" if _has_kernel(name, backend) else f"{name} has no kernel for {backend}"


@functools.cache
def _has_kernel(name: str, backend: str) -> bool:
    namespace, base = name.split("::")
    if not hasattr(getattr(torch.ops, namespace), base):
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, backend)
