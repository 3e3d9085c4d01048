"""What a captured graph costs: time of each of 1,000 tiny nodes, and launch-and-wait of a graph with one node."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import devices, native
from benchmarks.harness import Contestant, Factory, Goal, Row

NODES = 1000
ELEMENTS = 16
# Measured on a 2-core x86 machine: a function-pointer record table costs 1.8 ns a node, a spinning hand-off 178 ns.
ROOF_NODE_NS = 1.8
ROOF_LAUNCH_US = 0.18


def repeated(name: str, once: Callable[[], None], tensor: torch.Tensor, kept: Sequence[object] = ()) -> Contestant:
    """`once` adds 1 to `tensor` as often as the row says; the output is the sum after one run from zero."""

    def batch(count: int) -> None:
        for _ in range(count):
            once()

    def output() -> torch.Tensor:
        tensor.zero_()
        once()
        return tensor.cpu()

    return Contestant(name, batch, output, kept)


def replayed(name: str, nodes: int) -> Factory:
    """A graph of `nodes` additions, launched and waited for."""

    def factory() -> Contestant:
        device = devices.npu()
        with devices.needed(name):
            tensor, one = torch.zeros(ELEMENTS, device=device), torch.ones(ELEMENTS, device=device)
            graph = torch.npu.NPUGraph()
            torch.add(tensor, one, out=tensor)
            torch.npu.synchronize()
            with torch.npu.graph(graph):
                for _ in range(nodes):
                    torch.add(tensor, one, out=tensor)

        wait = devices.wait()

        def once() -> None:
            graph.replay()
            wait()

        # A graph holds addresses, not tensors: `one` has to stay alive as long as the graph.
        return repeated(name, once, tensor, kept=(graph, one))

    return factory


def eager(name: str, nodes: int, on_device: bool) -> Factory:
    """The same additions called one by one from Python, on `npu` or on the CPU."""

    def factory() -> Contestant:
        device = devices.npu() if on_device else torch.device("cpu")
        with devices.needed(name):
            tensor, one = torch.zeros(ELEMENTS, device=device), torch.ones(ELEMENTS, device=device)
        wait = devices.wait() if on_device else devices.nothing

        def once() -> None:
            with torch.inference_mode():
                for _ in range(nodes):
                    torch.add(tensor, one, out=tensor)
            wait()

        return repeated(name, once, tensor)

    return factory


def in_cpp() -> Contestant:
    """The same additions by a loop in C++ over ATen's operator, at::add_out in inference mode (add_out.cpp)."""
    with tempfile.TemporaryDirectory() as folder:
        library = native.compiled(
            "add_out.cpp", Path(folder) / "add_out.so", "-shared", "-fPIC", "-ltorch_cpu", "-lc10"
        )
        loop = ctypes.CDLL(str(library)).add_out_loop
    loop.argtypes, loop.restype = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64), None
    tensor = torch.zeros(ELEMENTS)
    return repeated("at::add_out", lambda: loop(tensor.data_ptr(), ELEMENTS, NODES), tensor)


def rows() -> list[Row]:
    return [
        Row(
            name="replay_per_node",
            title=f"time per node of a graph of {NODES} additions of {ELEMENTS} floats, launched and waited for",
            unit="ns",
            contestants={
                "graph replay": replayed("graph replay", NODES),
                "npu eager": eager("npu eager", NODES, True),
                "cpu eager": eager("cpu eager", NODES, False),
                "at::add_out": in_cpp,
            },
            reference="cpu eager",
            goals=(Goal(peer="graph replay", limit=20.0), Goal(peer="at::add_out", faster_than=10.0)),
            divisor=NODES,
            roof=ROOF_NODE_NS,
        ),
        Row(
            name="graph_launch",
            title="launch and wait of a graph with one node",
            unit="us",
            contestants={
                "graph replay": replayed("graph replay", 1),
                "npu eager": eager("npu eager", 1, True),
                "cpu eager": eager("cpu eager", 1, False),
            },
            reference="cpu eager",
            goals=(Goal(peer="graph replay", limit=10.0),),
            roof=ROOF_LAUNCH_US,
        ),
    ]
