"""The operator tables: their grammar, their page of documentation, what libopapi exports, and refused arguments."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
GENERATOR = ROOT / "runtime" / "aclnn" / "generate.py"
TABLES = sorted((ROOT / "runtime" / "aclnn").glob("*.ops"))
NULL_ARGUMENT, INVALID_ARGUMENT = 161001, 161002


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(GENERATOR), *map(str, arguments)], capture_output=True, text=True, check=False
    )


def names_in(tables: list[Path], folder: Path) -> list[str]:
    page = folder / "operators.md"
    assert run("--list", page, *tables).returncode == 0
    return re.findall(r"^\| (aclnn\w+) \|", page.read_text(), re.M)


def test_the_page_of_operators_is_current(tmp_path: Path) -> None:
    names_in(TABLES, tmp_path)
    assert (tmp_path / "operators.md").read_text() == (ROOT / "docs" / "operators.md").read_text(), (
        "run: python runtime/aclnn/generate.py --list docs/operators.md runtime/aclnn/*.ops"
    )


def test_no_operator_is_defined_twice_and_all_are_exported(tmp_path: Path) -> None:
    names = names_in(TABLES, tmp_path)
    assert len(names) == len(set(names)) > 400
    library = ctypes.CDLL("libopapi.so")
    missing = [n for n in names if not (hasattr(library, n) and hasattr(library, n + "GetWorkspaceSize"))]
    assert missing == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("aclnnX(Inn self) = f(self)", "unknown parameter kind `Inn`"),
        ("aclnnX(In self)", "expected `aclnnName"),
        ("aclnnX(In self) [dtype(self): float31] = f(self)", "unknown dtype 'float31'"),
        ("aclnnX(In self) [same_shape(self, out)] = f(self)", "names `out`, which is no parameter"),
        ("aclnnX(In self) = f(self)\naclnnX(In self) = g(self)", "is defined twice"),
        ("@each A b: One\naclnn{A}(In self) = f(self)\n@end", "does not fit"),
    ],
)
def test_a_wrong_definition_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    table = tmp_path / "wrong.ops"
    table.write_text(text + "\n")
    result = run(table, tmp_path / "out.cpp")
    assert result.returncode == 1
    assert message in result.stderr
    assert re.match(r"wrong\.ops:\d+:", result.stderr)


def test_words_of_a_constraint_may_hold_semicolons(tmp_path: Path) -> None:
    table = tmp_path / "words.ops"
    table.write_text('aclnnX(In self) [require(self: false, "is reserved; leave it out"); rank(self): 2] = f(self)\n')
    assert run(table, tmp_path / "out.cpp").returncode == 0
    assert '"is reserved; leave it out"' in (tmp_path / "out.cpp").read_text()


def recent_message() -> str:
    library = ctypes.CDLL("libascendcl.so")
    library.aclGetRecentErrMsg.restype = ctypes.c_char_p
    return (library.aclGetRecentErrMsg() or b"").decode()


def handle(tensor: torch.Tensor, dtype: int = 0) -> ctypes.c_void_p:
    library = ctypes.CDLL("libopapi.so")
    library.aclCreateTensor.restype = ctypes.c_void_p
    numbers = ctypes.c_int64 * max(1, tensor.dim())
    shape, stride = numbers(*tensor.shape), numbers(*tensor.stride())
    pointer = ctypes.c_void_p(tensor.data_ptr())
    return ctypes.c_void_p(
        library.aclCreateTensor(
            shape, ctypes.c_uint64(tensor.dim()), dtype, stride, ctypes.c_int64(0), 2, shape,
            ctypes.c_uint64(tensor.dim()), pointer,
        )
    )  # fmt: skip


def prepare_mul(*tensors: ctypes.c_void_p | None) -> int:
    library = ctypes.CDLL("libopapi.so")
    size, executor = ctypes.c_uint64(), ctypes.c_void_p()
    return int(library.aclnnMulGetWorkspaceSize(*tensors, ctypes.byref(size), ctypes.byref(executor)))


def test_refused_arguments_name_operator_argument_and_rule() -> None:
    a, b, c = (handle(torch.ones(s, device="npu")) for s in ((2, 3), (2, 4), (2, 3)))
    assert prepare_mul(a, None, c) == NULL_ARGUMENT
    assert "aclnnMul: argument `other` is required and is null" in recent_message()
    assert prepare_mul(a, b, c) == INVALID_ARGUMENT
    assert "`other` has shape [2, 4], which does not broadcast with [2, 3]" in recent_message()
    assert prepare_mul(a, a, b) == INVALID_ARGUMENT
    assert "`out` has shape [2, 4], but the operands broadcast to [2, 3]" in recent_message()


def test_a_missing_operator_fails_at_once_with_its_name() -> None:
    x = torch.ones(2, 3, 8, 8, device="npu")
    with pytest.raises(RuntimeError, match=r"(?i)im2col|unfold"):
        torch.nn.functional.unfold(x, 2)
