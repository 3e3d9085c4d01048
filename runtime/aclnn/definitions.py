"""Operator definitions (`*.ops`) as objects: the grammar is described in generate.py."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

TENSOR_MODES = {
    "In": "kRead",
    "OptIn": "kRead",
    "Weight": "kRead",
    "Out": "kWrite",
    "OptOut": "kWrite",
    "DynOut": "kWrite",
    "InOut": "kReadWrite",
}
LIST_MODES = {"InList": "kRead", "OptInList": "kRead", "OutList": "kWrite", "InOutList": "kReadWrite"}
ARRAYS = {"IntArray": "aclIntArray", "FloatArray": "aclFloatArray", "BoolArray": "aclBoolArray"}
ARRAY_ELEMENTS = {"IntArray": "int64_t", "FloatArray": "float", "BoolArray": "uint8_t"}
PLAIN = {
    "bool": "bool",
    "int8": "int8_t",
    "int32": "int32_t",
    "int64": "int64_t",
    "uint64": "uint64_t",
    "float": "float",
    "double": "double",
}
DTYPES = {
    "float16": "Half",
    "bfloat16": "BFloat16",
    "float32": "Float",
    "float64": "Double",
    "int8": "Char",
    "uint8": "Byte",
    "int16": "Short",
    "int32": "Int",
    "int64": "Long",
    "uint16": "UInt16",
    "uint32": "UInt32",
    "uint64": "UInt64",
    "bool": "Bool",
    "complex64": "ComplexFloat",
    "complex128": "ComplexDouble",
    "float8_e4m3fn": "Float8_e4m3fn",
    "float8_e5m2": "Float8_e5m2",
}
DTYPE_GROUPS = {
    "floating": ["float16", "bfloat16", "float32", "float64"],
    "integral": ["int8", "uint8", "int16", "int32", "int64"],
}


class DefinitionError(Exception):
    """A definition that cannot be understood; the message starts with file:line."""


@dataclass(frozen=True)
class Parameter:
    """One argument of an operator."""

    kind: str
    name: str

    @property
    def base(self) -> str:
        """The kind without `Opt`."""
        return self.kind.removeprefix("Opt")

    @property
    def is_optional(self) -> bool:
        return self.kind.startswith("Opt")

    @property
    def is_tensor(self) -> bool:
        return self.kind in TENSOR_MODES

    @property
    def is_list(self) -> bool:
        return self.kind in LIST_MODES

    def c_type(self) -> str:
        """The type in the C interface."""
        if self.is_tensor:
            return "const aclTensor*"
        if self.is_list:
            return "const aclTensorList*"
        if self.base in ("Scalar", "ScalarList"):
            return f"const acl{self.base}*"
        if self.base in ARRAYS:
            return f"const {ARRAYS[self.base]}*"
        if self.kind in ("str", "OptStr"):
            return "const char*"
        return "int32_t" if self.kind == "dtype" else PLAIN[self.kind]

    def record(self) -> str:
        """The statement that hands the argument to the Call."""
        n = self.name
        if self.kind == "Weight":
            return f'aclnn_call.weight("{n}", {n});'
        if self.is_tensor or self.is_list:
            mode = TENSOR_MODES[self.kind] if self.is_tensor else LIST_MODES[self.kind]
            function = "tensor" if self.is_tensor else "tensors"
            return f'aclnn_call.{function}("{n}", {n}, Mode::{mode}, {str(self.is_optional).lower()});'
        lines = []
        if not self.is_optional and self.c_type().endswith("*"):
            lines.append(f'aclnn_call.require("{n}", {n});')
        if self.base in ("Scalar", "IntArray") or self.kind == "bool":
            lines.append(f'aclnn_call.attribute("{n}", {n});')
        elif self.kind in ("float", "double"):
            lines.append(f'aclnn_call.attribute("{n}", static_cast<double>({n}));')
        elif self.kind in PLAIN or self.kind == "dtype":
            lines.append(f'aclnn_call.attribute("{n}", static_cast<int64_t>({n}));')
        elif self.base in ("str", "Str"):
            lines.append(f'aclnn_call.attribute("{n}", std::string({n} ? {n} : ""));')
        else:
            lines.append(f"(void){n};")
        return " ".join(lines)

    def prepared(self) -> tuple[str, str]:
        """Parameter type in a `=>` body, and the argument for it."""
        n = self.name
        if self.kind == "DynOut":
            return "Tensor&", f"const_cast<Tensor&>(*{n})"
        if self.is_tensor:
            return ("const Tensor*", n) if self.is_optional else ("const Tensor&", f"*{n}")
        if self.is_list:
            return ("const TensorList*", n) if self.is_optional else ("const TensorList&", f"*{n}")
        return self.value_type(), self.value()

    def value_type(self) -> str:
        """C++ type of a non-tensor argument inside a body."""
        if self.kind == "Scalar":
            return "const at::Scalar&"
        if self.kind == "OptScalar":
            return "std::optional<at::Scalar>"
        if self.kind == "ScalarList":
            return "const std::vector<at::Scalar>&"
        if self.kind == "OptIntArray":
            return "at::OptionalIntArrayRef"
        if self.base in ARRAYS:
            return f"c10::ArrayRef<{ARRAY_ELEMENTS[self.base]}>"
        if self.kind in ("str", "OptStr"):
            return "const std::string&"
        return "at::ScalarType" if self.kind == "dtype" else PLAIN[self.kind]

    def value(self) -> str:
        """Expression that turns a non-tensor C argument into what bodies see."""
        n = self.name
        if self.kind in ("Scalar", "OptScalar"):
            held = f"{n}->value"
            return held if self.kind == "Scalar" else f"({n} ? std::optional<at::Scalar>({held}) : std::nullopt)"
        if self.kind == "ScalarList":
            return f"{n}->values"
        if self.kind == "OptIntArray":
            return f"({n} ? at::OptionalIntArrayRef({n}->values) : at::OptionalIntArrayRef())"
        if self.base in ARRAYS:
            element = ARRAY_ELEMENTS[self.base]
            held = f"c10::ArrayRef<{element}>({n}->values)"
            return f"({n} ? {held} : c10::ArrayRef<{element}>())" if self.is_optional else held
        if self.kind in ("str", "OptStr"):
            return f'std::string({n} ? {n} : "")'
        return f"scalar_type(static_cast<aclDataType>({n}))" if self.kind == "dtype" else n

    def capture(self) -> tuple[str, str]:
        """Capture of a `=` body (owning), and the declaration at its top."""
        n = self.name
        held = f"aclnn_{n}"
        unused = "[[maybe_unused]] "
        if self.kind == "DynOut":
            return f"{held} = share({n})", f"{unused}Tensor& {n} = *{held};"
        if self.kind == "OptIn":
            return f"{held} = AtenOperand({n})", f"{unused}std::optional<at::Tensor> {n} = optional({held}.open());"
        if self.is_tensor:
            return f"{held} = AtenOperand({n})", f"{unused}at::Tensor& {n} = {held}.open();"
        if self.is_list:
            return f"{held} = AtenOperands({n})", f"{unused}std::vector<at::Tensor>& {n} = {held}.open();"
        if self.base in ARRAYS:
            capture = f"{held} = {n} ? share({n}) : c10::intrusive_ptr<{ARRAYS[self.base]}>()"
            value = Parameter(self.kind, held).value()
            return capture, f"{unused}{self.value_type()} {n} = {value};"
        declared = self.value_type().removeprefix("const ").removesuffix("&")
        return f"{held} = {declared}({self.value()})", f"{unused}const {declared}& {n} = {held};"


@dataclass
class Definition:
    """One operator."""

    name: str
    parameters: list[Parameter]
    constraints: list[str]
    prepared: tuple[str, int] | None
    aten: tuple[str, int] | None
    file: str
    line: int
    reads_nz: bool = False
    max_workspace: bool = False
    checks: list[str] = field(default_factory=list)

    def error(self, what: str) -> DefinitionError:
        return DefinitionError(f"{self.file}:{self.line}: {self.name}: {what}")


def _replace_each(lines: list[tuple[int, str]], file: str) -> Iterator[tuple[int, str]]:
    """Expands `@each ... @end`."""
    position = 0
    while position < len(lines):
        number, text = lines[position]
        if not text.startswith("@each"):
            yield number, text
            position += 1
            continue
        while text.rstrip().endswith(","):
            position += 1
            text = text.rstrip() + " " + lines[position][1].strip()
        head, _, rows = text[len("@each") :].partition(":")
        names = head.split()
        end = position + 1
        while end < len(lines) and lines[end][1].strip() != "@end":
            end += 1
        if end == len(lines) or not names:
            raise DefinitionError(f"{file}:{number}: @each needs names, a colon, rows, and a closing @end")
        for row in rows.split(","):
            values = row.split()
            if len(values) != len(names):
                raise DefinitionError(f"{file}:{number}: @each row `{row.strip()}` does not fit `{head.strip()}`")
            for body_number, body in lines[position + 1 : end]:
                for name, value in zip(names, values, strict=True):
                    body = body.replace("{" + name + "}", value)
                yield body_number, body
        position = end + 1


def _matching(text: str, start: int, error: DefinitionError) -> int:
    """Index after the bracket that closes the one at `start`."""
    pairs = {"(": ")", "[": "]", "{": "}"}
    depth = 0
    for index in range(start, len(text)):
        if text[index] in pairs:
            depth += 1
        elif text[index] in pairs.values():
            depth -= 1
            if depth == 0:
                return index + 1
    raise error


def _parse(text: str, file: str, line: int) -> list[Definition]:
    """Parses one logical definition (its lines joined by newlines)."""
    head = re.match(r"([\w, ]+)\(", text)
    problem = DefinitionError(f"{file}:{line}: expected `aclnnName(Kind name, ...) = body`: {text.splitlines()[0]}")
    if head is None:
        raise problem
    close = _matching(text, head.end() - 1, problem)
    parameters = []
    for item in filter(None, (p.strip() for p in text[head.end() : close - 1].split(","))):
        kind, _, name = item.rpartition(" ")
        kind = kind.strip()
        known = {"Scalar", "ScalarList", "str", "Str", "dtype", *ARRAYS, *PLAIN}
        if kind not in TENSOR_MODES and kind not in LIST_MODES and kind.removeprefix("Opt") not in known:
            raise DefinitionError(f"{file}:{line}: `{item}`: unknown parameter kind `{kind}`")
        parameters.append(Parameter(kind, name))
    rest = text[close:]
    constraints: list[str] = []
    stripped = rest.lstrip()
    if stripped.startswith("["):
        start = len(rest) - len(stripped)
        end = _matching(rest, start, problem)
        clauses = re.findall(r'(?:"[^"]*"|[^";])+', rest[start + 1 : end - 1])  # a semicolon in words does not end one
        constraints = [clause.strip() for clause in clauses if clause.strip()]
        rest = rest[:start] + "\n" * rest[start:end].count("\n") + rest[end:]
    prepared = aten = None
    base = line + text[:close].count("\n")
    markers = list(re.finditer(r"(?:^|(?<=\s))(=>|=)(?=\s)", rest))
    top = [m for m in markers if _depth(rest, m.start()) == 0]
    top = [m for i, m in enumerate(top) if i == 0 or rest[: m.start()].rpartition("\n")[2].strip() == ""]
    for index, marker in enumerate(top):
        stop = top[index + 1].start() if index + 1 < len(top) else len(rest)
        body = rest[marker.end() : stop]
        at = base + rest[: marker.end() + len(body) - len(body.lstrip())].count("\n")
        if marker.group(1) == "=>":
            prepared = (body.strip(), at)
        else:
            aten = (body.strip(), at)
    if prepared is None and aten is None:
        raise problem
    return [
        Definition(name.strip(), parameters, constraints, prepared, aten, file, line)
        for name in head.group(1).split(",")
    ]


def _depth(text: str, end: int) -> int:
    return sum((c in "([{") - (c in ")]}") for c in text[:end])


def read_definitions(path: Path) -> tuple[list[Definition], list[str]]:
    """The operators of one file and the headers it includes.

    Raises:
        DefinitionError: with file, line and what was expected.
    """
    lines = list(enumerate(path.read_text().splitlines(), 1))
    includes: list[str] = []
    pending: list[str] = []
    pending_line = 0
    definitions: list[Definition] = []
    for number, text in [*_replace_each(lines, path.name), (0, "#")]:
        if text[:1] in (" ", "\t") and text.strip() and pending:
            # A repeated body keeps its own line numbers.
            pending.append(text)
            continue
        if pending:
            definitions += _parse("\n".join(pending), path.name, pending_line)
            pending = []
        if text.startswith("@include"):
            includes.append(text.split(None, 1)[1])
        elif text.strip() and not text.startswith("#"):
            pending, pending_line = [text], number
    seen: set[str] = set()
    for definition in definitions:
        if definition.name in seen:
            raise definition.error("is defined twice")
        seen.add(definition.name)
        _check_clauses(definition)
    return definitions, includes


def _check_clauses(d: Definition) -> None:
    """Turns constraint clauses into C++ statements."""
    known = {p.name: p for p in d.parameters}

    def named(name: str) -> str:
        name = name.strip()
        if name not in known:
            raise d.error(f"constraint names `{name}`, which is no parameter")
        return f'{{"{name}", {name}}}'

    for clause in d.constraints:
        if clause == "max_workspace":
            d.max_workspace = True
        elif m := re.fullmatch(r"workspace\((.*)\)", clause, re.S):
            d.checks.append(f"aclnn_call.workspace_bytes = {m.group(1)};")
        elif m := re.fullmatch(r"nz\((.*)\)", clause):
            [named(n) for n in m.group(1).split(",")]
            d.reads_nz = True
        elif m := re.fullmatch(r"(same_dtype|same_shape)\((.*)\)", clause):
            d.checks.append(
                f"check::{m.group(1)}(aclnn_call, {{{', '.join(named(n) for n in m.group(2).split(','))}}});"
            )
        elif m := re.fullmatch(r"broadcast\((.*)->(.*)\)", clause):
            operands = ", ".join(named(n) for n in m.group(1).split(","))
            d.checks.append(f"check::broadcast(aclnn_call, {{{operands}}}, {named(m.group(2))});")
        elif m := re.fullmatch(r"dtype\((.*)\)\s*:\s*([\w\s]+)", clause):
            words = [w for word in m.group(2).split() for w in DTYPE_GROUPS.get(word, [word])]
            if unknown := [w for w in words if w not in DTYPES]:
                raise d.error(f"unknown dtype {unknown[0]!r}")
            allowed = ", ".join(f"c10::ScalarType::{DTYPES[w]}" for w in words)
            for name in m.group(1).split(","):
                d.checks.append(f"check::dtype_in(aclnn_call, {named(name)}, {{{allowed}}});")
        elif m := re.fullmatch(r"rank\((.*)\)\s*:\s*(\d+)(?:\.\.(\d+))?", clause):
            for name in m.group(1).split(","):
                d.checks.append(
                    f"check::rank_between(aclnn_call, {named(name)}, {m.group(2)}, {m.group(3) or m.group(2)});"
                )
        elif m := re.fullmatch(r"require\(\s*(\w+)\s*:\s*(.*),\s*(\"[^\"]*\")\s*\)", clause, re.S):
            named(m.group(1))
            d.checks.append(f'if (!({m.group(2)})) aclnn_call.refuse("{m.group(1)}", {m.group(3)});')
        else:
            raise d.error(f"unknown constraint `{clause}`")
