"""A program as Python that runs: one line a call, with the place in the user's model, shapes and dtypes beside it."""

from __future__ import annotations

import keyword
from collections.abc import Iterable, Iterator

from npu_compiler.inspect.names import is_function, is_name, is_operator
from npu_compiler.inspect.program import Argument, Call, Items, Named, Program, Result, SizeValue, TensorValue

CONSTANTS = "constants.safetensors"
"""The file with the constants of a graph's programs, beside their texts."""


def python_text(program: Program, title: str, counted: bool = False) -> str:
    """`program` as the text of a Python module.

    It defines `program(...)` and `inputs()`, which makes inputs of the compiled call's shapes: random floats, zeros for
    integers. Run as a script it prints what the program returns. A call of something that is no operator, such as a
    user's Python function, is printed as one that fails when it is reached.

    Args:
        counted: integers among the inputs are 0, 1, 2, ... instead.
    """
    body = [f"    {line}" for line in _body(program)]
    made = [_made_up(call, counted) for call in program.inputs]
    lines = [f'"""{_comment(title)}"""', "", *_imports(program, [*body, *made]), ""]
    if program.sizes:
        lines += [*(f"{name} = {size}" for name, size in sorted(program.sizes.items())), ""]
    if any(call.target not in program.made_up for call in program.constants):
        lines += [f'CONSTANTS = load_file(Path(__file__).parent / "{CONSTANTS}")', ""]
    lines += ["", f"def program({', '.join(call.name for call in program.inputs)}):", *body]
    lines += ["", "", "def inputs():", "    storages = {}", "    return ["]
    lines += [f"        {text}," for text in made]
    lines += ["    ]", "", "", 'if __name__ == "__main__":', "    print(program(*inputs()))", ""]
    return "\n".join(lines)


def _imports(program: Program, lines: Iterable[str]) -> Iterator[str]:
    text = "\n".join(lines)
    if "CONSTANTS[" in text:
        yield from ("from pathlib import Path", "")
    yield from (f"import {module}" for module in ("math", "operator") if f"{module}." in text)
    yield "import torch"
    if "CONSTANTS[" in text:
        yield "from safetensors.torch import load_file"
    yield f"from npu_compiler.inspect.made_up import tensor{', unknown' if 'unknown(' in text else ''}"
    if any(call.target.startswith("npu_fused.") for call in program.calls):
        yield from ("from npu_compiler import fusion_kernels", "", "fusion_kernels.register()")


def _body(program: Program) -> Iterator[str]:
    bound = {call.name for call in program.calls}
    place = ""
    for call in program.calls:
        described = ", ".join(map(str, call.values))
        if call.op == "placeholder":
            yield f"# {call.name}: {_comment(described)}"
            yield from _symbols(call, bound)
            continue
        if str(call.place) != place:
            place = str(call.place)
            if place:
                yield f"# {_comment(place)}"
        if call.op == "output":
            yield f"return {_text(call.args[0])}"
            continue
        made_by = f" ({_comment(call.made_by)})" if call.made_by else ""
        note = f"  # {_comment(described)}{made_by}" if described or made_by else ""
        yield f"{call.name} = {_expression(call, program)}{note}"
        yield from _symbols(call, bound)


def _symbols(call: Call, bound: set[str]) -> Iterator[str]:
    """Gives the symbols that a value shows their values, each once: `s0 = x.shape[0]`."""
    for index, found in enumerate(call.values):
        whole = call.name if len(call.values) == 1 else f"{call.name}[{index}]"
        parts = [(found.size, whole)] if isinstance(found, SizeValue) else []
        if isinstance(found, TensorValue) and call.op == "placeholder":
            parts = [(size, f"{whole}.shape[{dimension}]") for dimension, size in enumerate(found.shape)]
        for size, text in parts:
            if isinstance(size, str) and is_name(size) and size not in bound:
                bound.add(size)
                yield f"{size} = {text}"


def _expression(call: Call, program: Program) -> str:
    if call.op == "get_attr":
        (found,) = call.values or (None,)
        if not isinstance(found, TensorValue):
            return f"unknown({call.target!r})"
        if call.target in program.made_up:
            return _tensor(found, "{}")
        return f"CONSTANTS[{call.target!r}].to({found.device!r})"
    if call.target == "operator.getitem":
        return f"{_text(call.args[0])}[{_text(call.args[1])}]"
    given = [_text(argument) for argument in call.args]
    given += [f"{name}={_text(argument)}" for name, argument in call.kwargs.items() if not keyword.iskeyword(name)]
    odd = {name: argument for name, argument in call.kwargs.items() if keyword.iskeyword(name)}
    given += [f"**{{{name!r}: {_text(argument)}}}" for name, argument in odd.items()]
    return f"{_target(call.target)}({', '.join(given)})"


def _target(target: str) -> str:
    if is_operator(target):
        return _operator(target)
    return target if is_function(target) else f"unknown({target!r})"


def _operator(name: str) -> str:
    text = "torch.ops"
    for part in name.split("."):
        text = f"getattr({text}, {part!r})" if keyword.iskeyword(part) else f"{text}.{part}"
    return text


def _text(argument: Argument) -> str:
    match argument:
        case Result():
            return argument.name
        case Named(kind="device"):
            return f"torch.device({argument.text!r})"
        case Named(kind="operator"):
            return _operator(argument.text)
        case Named(kind="float"):
            return f"float({argument.text!r})"
        case Named(kind="other"):
            return f"unknown({argument.text!r})"
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


def _made_up(call: Call, counted: bool) -> str:
    """An expression for an input of the compiled call's shape."""
    (found,) = call.values or (None,)
    if isinstance(found, TensorValue):
        text = _tensor(found, "storages")
        return text.removesuffix(")") + ", counted=True)" if counted and "float" not in found.dtype else text
    return str(found.size) if found is not None else "None"


def _tensor(found: TensorValue, storages: str) -> str:
    shape, stride = (f"[{', '.join(map(str, sizes))}]" for sizes in (found.shape, found.stride))
    layout = f"{shape}, {stride}, {found.offset}, {found.dtype}, {found.device!r}"
    return f"tensor({storages}, {found.storage}, {layout})"


def _comment(text: str) -> str:
    """`text` in one line that neither ends a comment nor a docstring."""
    return " ".join(text.split()).replace('"', "'").replace("\\", "/").replace("\0", "")
