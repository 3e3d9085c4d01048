"""Parts of `python -m benchmarks parallel` that need several ranks, as processes with a core each.

`measured` starts them; each is `python -m benchmarks.parallel_ranks FOLDER RANK RANKS PART QUICK`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.apart import ROOT
from benchmarks.harness import Settings

RANKS = 2
TIMEOUT_S = 600
FOUND = "found.json"


def measured(part: str, quick: bool) -> list[dict[str, Any]]:
    """The records of a part, which rank 0 writes.

    Raises:
        RuntimeError: a rank failed; the end of its output is in the message. The others are ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, f"output.{rank}") for rank in range(RANKS)]
        running = [_started(folder, rank, part, quick, output) for rank, output in enumerate(outputs)]
        try:
            failed = _first_failure(running)
        finally:
            for process in running:
                process.kill()
                process.wait()
        if failed is not None:
            raise RuntimeError(f"rank {failed[0]}: {failed[1]}\n{outputs[failed[0]].read_text()[-3000:]}")
        return list(json.loads(Path(folder, FOUND).read_text()))


def _started(folder: str, rank: int, part: str, quick: bool, output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.parallel_ranks", folder, str(rank), str(RANKS), part, str(quick)]
    with output.open("wb") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)


def _first_failure(running: list[subprocess.Popen[bytes]]) -> tuple[int, str] | None:
    """Waits for all ranks, or for the first that fails: its number, and what happened."""
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        codes = [process.poll() for process in running]
        for rank, code in enumerate(codes):
            if code:
                return rank, f"exit code {code}"
        if None not in codes:
            return None
        time.sleep(0.1)
    late = next(rank for rank, process in enumerate(running) if process.poll() is None)
    return late, f"not done within {TIMEOUT_S} s"


def main() -> None:
    import torch
    import torch.distributed as dist

    from benchmarks import parallel_drop, parallel_layers

    folder, rank, ranks, part = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    quick = sys.argv[5] == "True"
    settings = Settings.quick() if quick else Settings(round_seconds=0.12, attempts=18)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    torch.npu.set_device(rank)
    dist.init_process_group("hccl", init_method=f"file://{folder / 'store'}", rank=rank, world_size=ranks)
    shared = torch.zeros(1, device="npu")

    def agree(number: float) -> float:
        shared.fill_(float(number))
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return float(shared.item())

    with torch.no_grad():
        if part == "drop":
            records = parallel_drop.measured(rank, ranks, settings, agree)
        else:
            records = parallel_layers.measured(part, rank, ranks, settings, agree)
    if rank == 0:
        (folder / FOUND).write_text(json.dumps(records))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
