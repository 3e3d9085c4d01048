"""What decides what the compiler makes of a graph: the key of what is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import npu_compiler
from npu_compiler import fusion_kernels
from npu_compiler.config import DECIDE_NOTHING, Options
from npu_compiler.errors import OptionError
from npu_compiler.graph import digest
from npu_compiler.passes import pipeline


def compiler_parts(options: Options) -> dict[str, str]:
    """Everything that decides what the compiler makes of a graph, part by part, as text."""
    folders = [Path(str(module.__file__)).parent for module in (npu_compiler, pipeline, fusion_kernels)]
    elsewhere = DECIDE_NOTHING | {"rules", "passes", "disabled_passes", "disabled_rules"}
    decisive = {entry.name: getattr(options, entry.name) for entry in fields(options) if entry.name not in elsewhere}
    return {
        **{f"option {name}": repr(value) for name, value in decisive.items()},
        **pipeline.own_content(options),
        "passes": pipeline.fingerprint(options),
        "versions": digest.versions(),
        "sources": digest.of_sources(folders),
    }


def key_without_graph(options: Options) -> dict[str, str]:
    """`compiler_parts`, or why there are none."""
    try:
        return compiler_parts(options)
    except OptionError as error:
        return {"none": error.what}


def fingerprint(options: Mapping[str, Any] | Options | None = None) -> str:
    """A hash of everything that decides what compile_fx makes of a graph: options, passes and their order, the content
    of the user's own rules and passes, the compiler's own sources, and the versions of Python, torch and torch_npu.
    Equal on every machine with the same set-up.

    Raises:
        OptionError: an option is wrong, or a user's rule or pass can't be hashed.
    """
    return digest.of_text(*sorted(compiler_parts(Options.of(options)).items()))
