"""What may stand in a program's text: names, operators and sizes of a closed form, so that data can't become code.

A bundle may come from a stranger. Whatever is read of it is checked by these types before it is printed as Python.
"""

from __future__ import annotations

import ast
import functools
import keyword
import re
from typing import Annotated

from pydantic import AfterValidator

_OPERATOR = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*){2}|higher_order(\.[A-Za-z_]\w*)+", re.ASCII)
_FUNCTION = re.compile(r"(operator|math)\.[A-Za-z]\w*|torch\._?sym_\w+", re.ASCII)
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.\w+)*", re.ASCII)
_DEVICE = re.compile(r"[a-z]\w*(:\d+)?", re.ASCII)
_TORCH = re.compile(r"torch\.[a-z]\w*", re.ASCII)
_NUMBERS = frozenset({"inf", "-inf", "nan"})
_SIZE_FUNCTIONS = frozenset({"max", "min", "abs", "int", "float", "round"})
_SIZE_MODULES = re.compile(r"math\.(floor|ceil|trunc|sqrt|log|log2|inf|nan)|torch\._?sym_\w+", re.ASCII)
_SIZE_NODES = (
    *(ast.Expression, ast.Constant, ast.Name, ast.Load, ast.Call, ast.Attribute, ast.IfExp),
    *(ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.operator, ast.unaryop, ast.boolop, ast.cmpop),
)
LONGEST = 4000
"""Characters a name or a size may have."""


def is_name(text: str) -> bool:
    """Whether `text` can stand as a variable in a Python program. Names with two leading underscores can't."""
    plain = text.isascii() and text.isidentifier() and len(text) <= LONGEST
    return plain and not keyword.iskeyword(text) and not text.startswith("__")


def is_operator(text: str) -> bool:
    """Whether `text` names an operator of torch.ops: `aten.add.Tensor`, `higher_order.auto_functionalized_v2`."""
    return _OPERATOR.fullmatch(text) is not None


def is_function(text: str) -> bool:
    """Whether `text` names one of the Python functions that a program calls with sizes, or `operator.getitem`."""
    return _FUNCTION.fullmatch(text) is not None


@functools.lru_cache(maxsize=4096)
def is_size(text: str) -> bool:
    """Whether `text` is arithmetic on numbers and names alone."""
    if len(text) > LONGEST:
        return False
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return all(_in_size(node, id(node) in called, id(node) in inner) for node in ast.walk(tree))


def names_in(text: str) -> set[str]:
    """The symbols in a size."""
    found = {node.id for node in ast.walk(ast.parse(text, mode="eval")) if isinstance(node, ast.Name)}
    return found - _SIZE_FUNCTIONS - {"math", "torch"}


def _in_size(node: ast.AST, called: bool, inner: bool) -> bool:
    match node:
        case ast.Constant():
            return type(node.value) in (int, float, bool)
        case ast.Attribute():
            return _SIZE_MODULES.fullmatch(ast.unparse(node)) is not None
        case ast.Name():
            return inner or (is_name(node.id) and (not called or node.id in _SIZE_FUNCTIONS))
        case ast.Call():
            return not node.keywords
    return isinstance(node, _SIZE_NODES)


def _checked(fits: object, what: str) -> AfterValidator:
    def check(text: str) -> str:
        if not fits(text):  # type: ignore[operator]
            raise ValueError(f"{text[:80]!r} is no {what}")
        return text

    return AfterValidator(check)


Name = Annotated[str, _checked(is_name, "name of a variable")]
Keyword = Annotated[str, _checked(lambda text: text.isascii() and text.isidentifier(), "name of an argument")]
Dotted = Annotated[str, _checked(_DOTTED.fullmatch, "dotted name")]
Device = Annotated[str, _checked(_DEVICE.fullmatch, "device")]
TorchName = Annotated[str, _checked(_TORCH.fullmatch, "name in torch")]
SizeText = Annotated[str, _checked(is_size, "size")]


def is_constant(kind: str, text: str) -> bool:
    """Whether `text` is the name of a constant of this kind (see program.Named)."""
    match kind:
        case "device":
            return _DEVICE.fullmatch(text) is not None
        case "operator":
            return is_operator(text)
        case "float":
            return text in _NUMBERS
        case "size":
            return is_size(text)
        case "other":
            return True  # it is printed as a text
    return _TORCH.fullmatch(text) is not None
