"""A hash over everything that decides what the compiler makes of a graph."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Iterable
from pathlib import Path

VERSIONED = ("torch", "torch_npu", "npu-compiler")


def of_sources(folders: Iterable[Path]) -> str:
    """Hash of the Python sources under `folders` (names and bytes, in a fixed order)."""
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            digest.update(str(file.relative_to(folder)).encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def of_text(*parts: object) -> str:
    """Hash of the parts' text; the parts are kept apart, so ("a", "b") and ("ab",) differ."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(str(part).encode() + b"\0")
    return digest.hexdigest()


def versions() -> str:
    """Versions of Python and of the packages that take part in compilation, "absent" where one is not installed."""
    found = [f"python={platform.python_version()}"]
    for name in VERSIONED:
        try:
            found.append(f"{name}={importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name}=absent")
    return " ".join(found)
