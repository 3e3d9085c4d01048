"""Who is shown what is done to a graph: a bundle, standard error, torch's structured trace.

Nothing of npu_compiler.inspect is imported until somebody asks for one of them.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from npu_compiler.config import Options
from npu_compiler.errors import OptionError
from npu_compiler.passes import pipeline

if TYPE_CHECKING:
    from npu_compiler.inspect.writer import GraphWriter

DUMP = "NPU_COMPILER_DUMP"
"""Environment variable with the folder for bundles; the option `dump` comes first."""
PRINT = "NPU_COMPILER_PRINT_PIPELINE"
"""Environment variable: anything but nothing and 0 does what the option `print_pipeline` does."""
TRACE = "torch.__trace"
"""The logger of torch's structured trace; it has handlers where TORCH_TRACE asks for one."""


def bundle_of(options: Options) -> Path | None:
    """This process's bundle, begun if it is not there yet; None where none is asked for.

    Raises:
        OptionError: nothing can be written there.
    """
    folder = _folder(options)
    if not folder:
        return None
    from npu_compiler.inspect import writer

    try:
        return writer.bundle_of(folder)
    except OSError as error:
        raise _no_bundle(folder, error) from error


def open_graph(
    name: str, options: Options, inputs: Sequence[str]
) -> contextlib.AbstractContextManager[GraphWriter | None]:
    """What writes a graph's part of a bundle, or prints its pipeline; None where neither is asked for.

    Args:
        inputs: names of the graph's inputs, in the user's terms.

    Raises:
        OptionError: nothing can be written there.
    """
    folder = _folder(options)
    if not folder and options.dump_inputs != "off":
        raise OptionError(
            f"dump_inputs={options.dump_inputs!r} keeps nothing",
            rule="inputs are kept in a bundle, and none is written",
            fix=f"name its folder with the option dump or ${DUMP}, or leave dump_inputs out",
        )
    prints = options.print_pipeline or os.environ.get(PRINT, "0") not in ("", "0")
    if not folder and not prints:
        return contextlib.nullcontext()
    from npu_compiler.inspect import writer

    try:
        return writer.open_graph(folder, name, options, pipeline.selected(options), inputs, prints)
    except OSError as error:
        raise _no_bundle(folder, error) from error


def shown_to(name: str, dump: GraphWriter | None) -> pipeline.Watch | None:
    """Who is shown the stages of a graph: the bundle, and torch's structured trace."""
    bundle = dump.stage if dump is not None else None
    if not logging.getLogger(TRACE).handlers:
        return bundle
    from npu_compiler.inspect import structured

    return structured.also(name, bundle)


def _folder(options: Options) -> str:
    return options.dump or os.environ.get(DUMP, "")


def _no_bundle(folder: str, error: OSError) -> OptionError:
    return OptionError(
        f"no bundle can be written in {folder!r}: {error}",
        rule=f"dump, or ${DUMP}, names a folder that can be written or made",
        fix="name another one",
    )
