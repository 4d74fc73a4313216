"""Pruning a synthetic Llama at random, against a plain copy; peak memory at 8 and 32 layers.

python tests/benchmarks/pruning.py FOLDER LAYERS
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from llama import Llama
from measure import median, peak_memory, timed_copy

import loram_ray as lr
from loram_ray.artifacts.tensorfile import CheckpointWriter, TensorSpec

ROUNDS, RATIO = 3, 0.65
SIZES = Llama(2048, 8192, heads=32, kv_heads=8, head_dim=64, vocabulary=32000)


def write_base(directory: Path, layers: int) -> None:
    SIZES.start(directory, layers)
    shapes = SIZES.shapes(layers)
    specs = {name: TensorSpec(shape, torch.bfloat16) for name, shape in shapes.items()}
    with CheckpointWriter(directory, specs) as writer:
        for name, spec in specs.items():
            writer.write(name, torch.randn(spec.shape, dtype=torch.bfloat16))


def main() -> None:
    folder, layers = Path(sys.argv[1]), int(sys.argv[2])
    if len(sys.argv) > 3:  # in a process of its own: its memory is not pruning's
        write_base(folder / "base", layers)
        print("{}")
        return
    pruning, copying = [], []
    files = sorted((folder / "base").glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    for i in range(ROUNDS):
        copying.append(timed_copy(files, folder / "copy"))
        started = time.perf_counter()
        lr.prune(
            lr.PruneConfig(
                base=str(folder / "base"),
                output=folder / f"pruned_{i}",
                ratio=RATIO,
                layers=(1, layers - 1),
            )
        )
        pruning.append(time.perf_counter() - started)
    result = {
        "layers": layers,
        "bytes": size,
        "bytes_per_second": size / median(pruning),
        "copy_bytes_per_second": size / median(copying),
        "ratio": median([b / a for a, b in zip(pruning, copying, strict=True)]),
        "peak_bytes": peak_memory(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
