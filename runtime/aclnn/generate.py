"""Turns operator definitions (`*.ops`) into the C entry points that torch_npu looks up in libopapi.

    generate.py FAMILY.ops FAMILY.ops.cpp     write one C++ file
    generate.py --list OUT.md FAMILY.ops...   write the page of documentation that lists all operators

A definition starts in column one; indented lines continue it; `#` in column one starts a comment.

    aclnnAdd(In self, In other, Scalar alpha, Out out)
        [broadcast(self, other -> out)]
        => kernels::add(self, other, alpha, out)
        = at::add_out(out, self, other, alpha)

**Parameters** follow the order of op-plugin's call site, which is the ABI: a wrong `float`/`double` is silent garbage.
The column `=>` says what the name is in a prepared expression, `=` what it is in an ATen expression.

    kind                          C type                 =>                          =
    In, Out, InOut                const aclTensor*       const Tensor&               at::Tensor&
    Weight                        the same: an In that the operator reads from its first byte to its last
    OptIn                         const aclTensor*       const Tensor* (or null)     std::optional<at::Tensor>
    OptOut                        const aclTensor*       const Tensor* (or null)     at::Tensor& (maybe undefined)
    DynOut                        const aclTensor*       Tensor&                     Tensor& (use write_dynamic)
    InList, OutList, InOutList    const aclTensorList*   const TensorList&           std::vector<at::Tensor>&
    OptInList                     const aclTensorList*   const TensorList* or null   std::vector<at::Tensor>& (or empty)
    Scalar / OptScalar            const aclScalar*       at::Scalar / std::optional<at::Scalar>     the same
    ScalarList                    const aclScalarList*   std::vector<at::Scalar>                    the same
    IntArray / OptIntArray        const aclIntArray*     at::IntArrayRef / at::OptionalIntArrayRef  the same
    FloatArray / OptFloatArray    const aclFloatArray*   c10::ArrayRef<float> (empty when absent)   the same
    BoolArray / OptBoolArray      const aclBoolArray*    c10::ArrayRef<uint8_t> (empty when absent) the same
    str / OptStr                  const char*            std::string (empty when absent)            the same
    dtype                         int32_t (aclDataType)  at::ScalarType                             the same
    bool int8 int32 int64 uint64 float double            the C++ type of that name                  the same

**Bodies.** `=> EXPR` runs in phase 1 and gives a `Work` (a prepared `void()` callable that owns all it needs but
device memory; kernels live in runtime/kernels); an empty Work declines, and then the `=` body is used. `call` in the
expression is the Call: for refusals and for `call.workspace(bytes)`, device scratch that phase 2 brings. `= EXPR` or
`= { statements }` runs on the stream at each execution, and calls ATen; results must be written in place.

**Constraints**, in brackets, separated by semicolons, are checked in phase 1 (ACLNN_ERR_PARAM_INVALID, 161002):

    same_dtype(a, b, ...)           same_shape(a, b, ...)          broadcast(a, b, ... -> result)
    dtype(a): float16 bfloat16      rank(a): 2 or rank(a): 2..4    require(a: C++ condition, "rule in words")
    nz(a, ...)                      the `=>` body reads FRACTAL_NZ operands itself (otherwise `=` gets them unpacked,
                                    and without `=` they are refused)
    workspace(EXPR)                 bytes that phase 1 asks for
    max_workspace                   also export aclnnXGetMaxWorkspaceSize

`dtype` takes torch names and the groups `floating` (float16 bfloat16 float32 float64) and `integral` (int8 uint8 int16
int32 int64). In `require`, tensors are `const Tensor*`, the rest as in the C interface.

**Repetition**: names in braces are replaced in every definition between `@each` and `@end`:

    @each Name function: Abs abs, Acos acos
    aclnn{Name}(In self, Out out) = at::{function}_out(out, self)
    @end

`@include "header.h"` adds an include. Several names before the parenthesis, separated by commas, share one definition.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from definitions import Definition, DefinitionError, read_definitions


def _prepared_body(d: Definition) -> str:
    assert d.prepared is not None
    body, line = d.prepared
    typed = [(p, *p.prepared()) for p in d.parameters if re.search(rf"\b{p.name}\b", body)]
    parameters = ", ".join(f"{kind} {p.name}" for p, kind, _ in typed)
    arguments = ", ".join(argument for _, _, argument in typed)
    if re.search(r"\bcall\b", body):
        parameters = ", ".join(filter(None, ["Call& call", parameters]))
        arguments = ", ".join(filter(None, ["aclnn_call", arguments]))
    guard = "" if d.reads_nz or d.aten is None else "aclnn_call.all_plain() && "
    lines = []
    if d.aten is None and not d.reads_nz:
        lines.append("    aclnn_call.require_plain();")
    lines += [
        f"    if ({guard}aclnn_call.take([]({parameters}) -> Work {{",
        "      return",
        f'#line {line} "{d.file}"',
        f"      {body};",
        f"    }}({arguments}))) return;",
    ]
    if d.aten is None:
        lines.append('    throw std::runtime_error("this combination of arguments has no kernel");')
    return "\n".join(lines)


def _aten_body(d: Definition) -> str:
    assert d.aten is not None
    body, line = d.aten
    used = [p for p in d.parameters if re.search(rf"\b{p.name}\b", body)]
    captures = ", ".join(p.capture()[0] for p in used)
    lines = [f"    aclnn_call.take_aten([{captures}]() mutable {{"]
    lines += [f"      {p.capture()[1]}" for p in used]
    lines += [f'#line {line} "{d.file}"', f"      {body};"]
    lines += [
        f'      aclnn_{p.name}.close("{p.name}");'
        for p in used
        if p.kind in ("Out", "OptOut", "InOut", "OutList", "InOutList")
    ]
    return "\n".join([*lines, "    });"])


def entry_points(d: Definition) -> str:
    """The C functions of one operator."""
    parameters = "".join(f"{p.c_type()} {p.name}, " for p in d.parameters)
    names = ", ".join(p.name for p in d.parameters)
    body = [f"    {p.record()}" for p in d.parameters] + [f"    {check}" for check in d.checks]
    if d.prepared:
        body.append(_prepared_body(d))
    if d.aten:
        body.append(_aten_body(d))
    text = [
        f"ACLNN_ENTRY int {d.name}GetWorkspaceSize({parameters}uint64_t* aclnn_workspace,"
        " aclOpExecutor** aclnn_executor) {",
        f'  return prepare("{d.name}", aclnn_workspace, aclnn_executor, [&](Call& aclnn_call) {{',
        *body,
        "  });",
        "}",
        f"ACLNN_ENTRY int {d.name}(void* workspace, uint64_t workspaceSize, aclOpExecutor* executor,"
        " aclrtStream stream) {",
        f'  return execute("{d.name}", workspace, workspaceSize, executor, stream);',
        "}",
    ]
    if d.max_workspace:
        text += [
            f"ACLNN_ENTRY int {d.name}GetMaxWorkspaceSize({parameters}uint64_t* aclnn_workspace,"
            " aclOpExecutor** aclnn_executor) {",
            f"  return {d.name}GetWorkspaceSize({names + ', ' if names else ''}aclnn_workspace, aclnn_executor);",
            "}",
        ]
    return "\n".join(text)


def translation_unit(path: Path) -> str:
    """The C++ file of one table."""
    definitions, includes = read_definitions(path)
    header = [
        f"// Written by generate.py from {path.name}.",
        '#include "runtime/aclnn/aten.h"',
        '#include "runtime/aclnn/checks.h"',
        '#include "runtime/aclnn/helpers.h"',
        '#include "runtime/aclnn/operator.h"',
        *(f"#include {include}" for include in includes),
        "",
        '#define ACLNN_ENTRY extern "C" __attribute__((visibility("default")))',
        "",
        "namespace aclnn {",
    ]
    return "\n".join([*header, *(entry_points(d) for d in definitions), "}  // namespace aclnn", ""])


def listing(paths: list[Path]) -> str:
    """Markdown of all operators: name, parameters, how it runs."""
    lines = [
        "# Operators of the host runtime",
        "",
        "Written by `runtime/aclnn/generate.py --list`; do not edit. `prepared`: a kernel with resolved arguments,",
        "what a captured graph replays; `ATen`: PyTorch's CPU operator; `prepared, ATen`: prepared where the operands",
        "allow, ATen otherwise. The grammar of the tables is described at the top of `runtime/aclnn/generate.py`.",
    ]
    total = 0
    for path in sorted(paths):
        definitions, _ = read_definitions(path)
        total += len(definitions)
        lines += ["", f"## {path.stem}", "", "| operator | arguments | runs as |", "|---|---|---|"]
        for d in sorted(definitions, key=lambda d: d.name):
            how = ", ".join([*(["prepared"] if d.prepared else []), *(["ATen"] if d.aten else [])])
            arguments = ", ".join(f"{p.kind} {p.name}" for p in d.parameters)
            lines.append(f"| {d.name} | {arguments} | {how} |")
    return "\n".join([*lines, "", f"{total} operators.", ""])


def main(arguments: list[str]) -> int:
    """Command line; see the module's docstring."""
    try:
        if arguments[:1] == ["--list"] and len(arguments) > 2:
            Path(arguments[1]).write_text(listing([Path(a) for a in arguments[2:]]))
        elif len(arguments) == 2:
            Path(arguments[1]).write_text(translation_unit(Path(arguments[0])))
        else:
            print("usage: generate.py TABLE.ops OUT.cpp | generate.py --list OUT.md TABLE.ops...", file=sys.stderr)
            return 2
    except DefinitionError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
