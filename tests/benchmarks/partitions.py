"""Memory of ZeRO-3 loading and export, by the number of workers.

    python tests/benchmarks/partitions.py FOLDER
    python tests/benchmarks/partitions.py FOLDER --quick

Each worker is a process with gloo; the model is random, in bf16. What a process takes beyond what
it had before (Python, torch, DeepSpeed, the process group) is to be ``constant + slope / workers``,
the slope the model's bytes. The largest of the workers counts.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import in_fresh_process, peak_memory, reset_peak_memory

WORKERS, LAYERS, QUICK_LAYERS = (1, 2, 4), 24, 4


def work(rank: int, folder: Path, workers: int, port: int) -> None:
    """One worker: load, then export, peaks written down."""
    from loram_ray.alignment.deepspeed_config import (
        export_partitioned,
        import_deepspeed,
        load_partitioned,
    )
    from loram_ray.runtime.memory import return_freed_memory

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(workers), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    import_deepspeed().init_distributed(dist_init_required=False)
    settings = {
        "train_batch_size": workers,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
    }
    load_partitioned(folder / "tiny", settings, "bf16")  # imports what loading imports
    found: dict[str, float] = {}
    gc.collect()
    return_freed_memory()
    before = reset_peak_memory()
    started = time.perf_counter()
    model = load_partitioned(folder / "base", settings, "bf16")
    found["load_seconds"] = time.perf_counter() - started
    found["load"] = peak_memory() - before
    return_freed_memory()
    found["held"] = reset_peak_memory() - before
    started = time.perf_counter()
    export_partitioned(model, folder / "base", folder / f"out_{workers}", True, writes=rank == 0)
    found["export_seconds"] = time.perf_counter() - started
    found["export"] = peak_memory() - before
    (folder / f"{workers}_{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def measure(folder: Path, workers: int) -> dict[str, float]:
    """The largest of each number over the workers."""
    shutil.rmtree(folder / f"out_{workers}", ignore_errors=True)
    (folder / f"out_{workers}").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (folder, workers, port), nprocs=workers)
    files = [folder / f"{workers}_{rank}.json" for rank in range(workers)]
    found = [json.loads(file.read_text()) for file in files]
    return {name: max(one[name] for one in found) for name in found[0]}


def fit(by_workers: dict[int, float]) -> dict[str, float]:
    """Least squares of ``constant + slope / workers``, and the largest residual."""
    shares = torch.tensor([[1.0, 1 / workers] for workers in by_workers], dtype=torch.float64)
    values = torch.tensor(list(by_workers.values()), dtype=torch.float64)
    solved = torch.linalg.lstsq(shares, values).solution
    residual = (shares @ solved - values).abs().max()
    return {"constant": float(solved[0]), "slope": float(solved[1]), "residual": float(residual)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS)
    parser.add_argument("--quick", action="store_true", help="a small model, one and two workers")
    parser.add_argument("--write", type=int, metavar="LAYERS", help="only write the models")
    options = parser.parse_args()
    folder = options.folder.resolve()
    if options.write:
        from calibration import WIDTH, write_base

        write_base(folder / "tiny", 1, replace(WIDTH, intermediate=64))
        write_base(folder / "base", options.write, WIDTH)
        print("{}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    layers = QUICK_LAYERS if options.quick else LAYERS
    in_fresh_process(Path(__file__), str(folder), "--write", str(layers))
    workers = (1, 2) if options.quick else options.workers
    measured = {count: measure(folder, count) for count in workers}
    found: dict[str, Any] = {
        "bytes": sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors")),
        "workers": measured,
        "fit": {
            name: fit({count: one[name] for count, one in measured.items()})
            for name in ("load", "held", "export")
        },
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
