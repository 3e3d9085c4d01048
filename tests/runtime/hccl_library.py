"""libhccl through its C interface, without torch: what the rank processes of `test_hccl_library.py` use.

Device memory of the host runtime is ordinary memory, but the buffers here are numpy arrays: the collectives only need
addresses, and a numpy array keeps this file free of allocation calls.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npu_compiler.runtime import loader

ACL_ERROR_REPEAT_INITIALIZE = 100002

ROOT_INFO_BYTES = 4108
TYPES = {
    "int8": 0, "int16": 1, "int32": 2, "float16": 3, "float32": 4, "int64": 5, "uint64": 6, "uint8": 7,
    "uint16": 8, "uint32": 9, "float64": 10, "bfloat16": 11,
}  # fmt: skip
OPS = {"sum": 0, "prod": 1, "max": 2, "min": 3}
SUCCESS, E_PARA, E_PTR, E_NOT_SUPPORT, E_TIMEOUT, E_REMOTE = 0, 1, 2, 5, 9, 21
SEND, RECV = 0, 1


class HcclError(RuntimeError):
    """A call that returned an error code; `code` is an HcclResult or, from a stream, an aclError."""

    def __init__(self, call: str, code: int, message: str) -> None:
        super().__init__(f"{call}: {code}: {message}")
        self.code = code


class SendRecvItem(ctypes.Structure):
    """HcclSendRecvItem."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("count", ctypes.c_uint64),
        ("data_type", ctypes.c_int),
        ("peer", ctypes.c_uint32),
    ]


def u64(values: list[int]) -> Any:
    return (ctypes.c_uint64 * len(values))(*values)


@dataclass
class Rank:
    """One rank: the libraries, a stream and a communicator."""

    rank: int
    ranks: int
    acl: ctypes.CDLL = field(init=False)
    hccl: ctypes.CDLL = field(init=False)
    stream: ctypes.c_void_p = field(init=False)
    comm: ctypes.c_void_p = field(init=False)

    def __post_init__(self) -> None:
        folder = loader.choose().folder
        self.acl = ctypes.CDLL(str(folder / "libascendcl.so"), mode=ctypes.RTLD_GLOBAL)
        self.hccl = ctypes.CDLL(str(folder / "libhccl.so"))
        self.acl.aclGetRecentErrMsg.restype = ctypes.c_char_p
        self.stream = ctypes.c_void_p()
        self.comm = ctypes.c_void_p()
        initialised = self.acl.aclInit(None)
        if initialised != ACL_ERROR_REPEAT_INITIALIZE:  # torch_npu may have done it in this process
            self.check("aclInit", initialised)
        self.check("aclrtSetDevice", self.acl.aclrtSetDevice(self.rank))
        self.check("aclrtCreateStream", self.acl.aclrtCreateStream(ctypes.byref(self.stream)))

    def recent_message(self) -> str:
        return (self.acl.aclGetRecentErrMsg() or b"").decode()

    def check(self, call: str, code: int) -> None:
        if code != 0:
            raise HcclError(call, code, self.recent_message())

    def call(self, name: str, *arguments: Any) -> None:
        """Calls libhccl's `name`; numpy arrays are passed by address."""
        plain = [a.ctypes.data_as(ctypes.c_void_p) if isinstance(a, np.ndarray) else a for a in arguments]
        self.check(name, getattr(self.hccl, name)(*plain))

    def synchronize(self) -> None:
        self.check("aclrtSynchronizeStream", self.acl.aclrtSynchronizeStream(self.stream))

    def run(self, name: str, *arguments: Any) -> None:
        """A collective on this rank's communicator and stream, to its end."""
        self.call(name, *arguments, self.comm, self.stream)
        self.synchronize()

    def batch(self, items: list[tuple[int, NDArray[Any], str, int]]) -> None:
        """HcclBatchSendRecv of (SEND or RECV, array, type name, peer)."""
        array = (SendRecvItem * len(items))()
        for slot, (kind, buffer, type_name, peer) in zip(array, items, strict=True):
            slot.type, slot.buffer, slot.count = kind, buffer.ctypes.data, buffer.size
            slot.data_type, slot.peer = TYPES[type_name], peer
        self.run("HcclBatchSendRecv", array, len(items))

    def join(self, folder: Path, name: str = "root_info") -> None:
        """Rank 0 makes the root info and leaves it in `folder`; all join."""
        path = folder / name
        if self.rank == 0:
            info = ctypes.create_string_buffer(ROOT_INFO_BYTES)
            self.call("HcclGetRootInfo", info)
            draft = path.with_suffix(".draft")
            draft.write_bytes(info.raw)
            draft.rename(path)
        wait_for_file(path)
        info = ctypes.create_string_buffer(path.read_bytes(), ROOT_INFO_BYTES)
        self.call("HcclCommInitRootInfo", self.ranks, info, self.rank, ctypes.byref(self.comm))


def wait_for_file(path: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            raise TimeoutError(f"{path} did not appear within {seconds} s")
        time.sleep(0.005)


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest even, as bits."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def encode(values: NDArray[Any], type_name: str) -> NDArray[Any]:
    """`values` in the storage of an HCCL data type."""
    return to_bfloat16(values) if type_name == "bfloat16" else values.astype(type_name)


def decode(stored: NDArray[Any], type_name: str) -> NDArray[Any]:
    return from_bfloat16(stored) if type_name == "bfloat16" else stored


def contribution(rank: int, count: int, type_name: str) -> NDArray[Any]:
    """What `rank` brings to a collective: every rank can work out everybody's. Small integers and, in the floating
    types, quarters, so that sums over a few ranks are exact and the order of addition cannot hide an error."""
    return _contribution(rank, count, type_name).copy()


@cache
def _contribution(rank: int, count: int, type_name: str) -> NDArray[Any]:
    values = np.random.default_rng(1000 + rank).integers(-6, 7, size=count).astype(np.float32)
    if type_name.startswith("uint"):
        values = np.abs(values)
    if "float" in type_name:
        values = values / 4
    return encode(values, type_name)


REDUCERS: dict[str, Callable[..., Any]] = {
    "sum": np.add.reduce,
    "prod": np.multiply.reduce,
    "max": np.maximum.reduce,
    "min": np.minimum.reduce,
}


def reduced(ranks: int, count: int, type_name: str, op: str) -> NDArray[Any]:
    """The expected result of a reduction over all ranks, in the storage of the type."""
    exact = [decode(contribution(r, count, type_name), type_name).astype(np.float64) for r in range(ranks)]
    return encode(REDUCERS[op](exact), type_name)
