"""A program as Python that runs: one line a call, with the place in the user's model, shapes and dtypes beside it."""

from __future__ import annotations

import keyword
from collections.abc import Iterable, Iterator

from npu_compiler.inspect.program import Argument, Call, Items, Named, Program, Result, SizeValue, TensorValue

CONSTANTS = "constants.safetensors"
"""The file with a program's constants, beside its text."""


def python_text(program: Program, title: str) -> str:
    """`program` as the text of a Python module.

    It defines `program(...)` and `inputs()`, which makes inputs of the compiled call's shapes: random floats, zeros for
    integers. Run as a script it prints what the program returns.
    """
    calls = program.calls
    inputs = [call for call in calls if call.op == "placeholder"]
    constants = [call for call in calls if call.op == "get_attr"]
    lines = [f'"""{_one_line(title)}"""', "", *_imports(calls, bool(constants)), ""]
    if program.sizes:
        lines += [*(f"{name} = {size}" for name, size in sorted(program.sizes.items())), ""]
    if constants:
        lines += [f'CONSTANTS = load_file(Path(__file__).parent / "{CONSTANTS}")', ""]
    lines += ["", f"def program({', '.join(call.name for call in inputs)}):"]
    lines += [f"    {line}" for line in _body(calls)]
    lines += ["", "", "def inputs():", "    storages = {}", "    return ["]
    lines += [f"        {_made_up(call)}," for call in inputs]
    lines += ["    ]", "", "", 'if __name__ == "__main__":', "    print(program(*inputs()))", ""]
    return "\n".join(lines)


def _imports(calls: Iterable[Call], constants: bool) -> Iterator[str]:
    modules = {"torch"}
    namespaces = set()
    for call in calls:
        if call.op == "call_function" and not _is_operator(call.target) and call.target != "operator.getitem":
            modules.add(call.target.rpartition(".")[0])
        namespaces.add(call.target.partition(".")[0])
    if constants:
        yield "from pathlib import Path"
        yield ""
    yield from (f"import {module}" for module in sorted(modules))
    if constants:
        yield "from safetensors.torch import load_file"
    yield "from npu_compiler.inspect.made_up import tensor"
    if "npu_fused" in namespaces:
        yield "from npu_compiler import fusion_kernels"
        yield ""
        yield "fusion_kernels.register()"


def _body(calls: Iterable[Call]) -> Iterator[str]:
    place = ""
    for call in calls:
        described = ", ".join(map(str, call.values))
        if call.op == "placeholder":
            yield from _size_names(call)
            yield f"# {call.name}: {_one_line(described)}"
            continue
        if str(call.place) != place:
            place = str(call.place)
            if place:
                yield f"# {_one_line(place)}"
        if call.op == "output":
            yield f"return {_text(call.args[0])}"
            continue
        note = f"  # {_one_line(described)}" if described else ""
        made_by = f" ({call.made_by})" if call.made_by else ""
        yield f"{call.name} = {_expression(call)}{note}{made_by if note else ''}"


def _size_names(call: Call) -> Iterator[str]:
    """A size input gives its symbol a value."""
    for found in call.values:
        if isinstance(found, SizeValue) and isinstance(found.size, str) and found.size.isidentifier():
            if found.size != call.name:
                yield f"{found.size} = {call.name}"


def _expression(call: Call) -> str:
    if call.op == "get_attr":
        return f"CONSTANTS[{call.target!r}].to({str(_device(call))!r})"
    if call.target == "operator.getitem":
        return f"{_text(call.args[0])}[{_text(call.args[1])}]"
    given = [_text(argument) for argument in call.args]
    given += [f"{name}={_text(argument)}" for name, argument in call.kwargs.items()]
    target = f"torch.ops.{call.target}" if _is_operator(call.target) else call.target
    return f"{target}({', '.join(given)})"


def _is_operator(target: str) -> bool:
    """Whether a call's target is an operator, such as aten.add.Tensor, and not a function of a Python module."""
    return target.startswith("higher_order.") or target.count(".") == 2


def _text(argument: Argument) -> str:
    match argument:
        case Result():
            return argument.name
        case Named(kind="device"):
            return f"torch.device({argument.text!r})"
        case Named(kind="operator"):
            return f"torch.ops.{argument.text}"
        case Named(kind="float"):
            return f"float({argument.text!r})"
        case Named():
            return argument.text
        case Items():
            return _items(argument)
    return repr(argument)


def _items(argument: Items) -> str:
    parts = [_text(item) for item in argument.items]
    match argument.kind:
        case "mapping":
            return "{" + ", ".join(f"{key!r}: {part}" for key, part in zip(argument.keys, parts, strict=True)) + "}"
        case "slice":
            return f"slice({', '.join(parts)})"
        case "list":
            return f"[{', '.join(parts)}]"
    return f"({parts[0]},)" if len(parts) == 1 else f"({', '.join(parts)})"


def _made_up(call: Call) -> str:
    """An expression for an input of the compiled call's shape."""
    (found,) = call.values
    if isinstance(found, SizeValue):
        return str(found.size)
    shape, stride = (f"[{', '.join(map(str, sizes))}]" for sizes in (found.shape, found.stride))
    return f"tensor(storages, {found.storage}, {shape}, {stride}, {found.offset}, {found.dtype}, {found.device!r})"


def _device(call: Call) -> str:
    found = call.values[0]
    return found.device if isinstance(found, TensorValue) else "cpu"


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace('"""', "'''").replace("\\", "/")


def is_name(text: str) -> bool:
    """Whether `text` can stand as a name in a Python program."""
    return text.isidentifier() and not keyword.iskeyword(text)
