"""Recovery of an adapter of LLaMA-3.1-70B's shapes, against copying the recovered file.

python tests/benchmarks/recovery.py FOLDER

80 layers, 74 of them pruned at 0.85, r 8 on all seven linears, random values. The base is there
with its real shapes as sparse files, so that the whole stage runs, fingerprint included.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import torch
from llama import Llama
from measure import median, peak_memory, timed_copy

import loram_ray as lr
from loram_ray.architectures import architecture_of
from loram_ray.artifacts.adapter import ADAPTER_FILE, CONFIG_FILE
from loram_ray.artifacts.adapter_names import tensor_name
from loram_ray.artifacts.manifest import fingerprint, read_model_config
from loram_ray.artifacts.stage_directory import StageDirectory, run_stage
from loram_ray.artifacts.tensorfile import Checkpoint, TensorSpec, TensorWriter
from loram_ray.plan import PruningPlan
from loram_ray.pruning.random_scores import random_scores
from loram_ray.pruning.selection import keep_units, layer_ratios

ROUNDS, RANK = 5, 8
LAYERS = 80
SIZES = Llama(8192, 28672, heads=64, kv_heads=8, head_dim=128, vocabulary=128256)


def base_shapes() -> dict[str, tuple[int, ...]]:
    return SIZES.shapes(LAYERS)


def write_sparse_base(directory: Path) -> None:
    """A model directory of the real shapes whose weights are holes in a sparse file."""
    SIZES.start(directory, LAYERS)
    header, offset = {}, 0
    for name, shape in base_shapes().items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + offset)


def write_pruned_adapter(base: Path, output: Path) -> None:
    family = architecture_of("llama")
    with Checkpoint(base) as checkpoint:
        identity = fingerprint(checkpoint)
    geometry = family.geometry(read_model_config(base))
    layers, ratio = (4, 78), 0.85
    scores, ratios = (
        random_scores(family.units, geometry, layers, 0),
        layer_ratios(ratio, None, layers),
    )
    kept = keep_units(scores, geometry, ratios)
    plan = PruningPlan(family.model_type, geometry, "random", ratio, 0, layers, identity, kept)
    specs = {}
    for name, shape in base_shapes().items():
        module = name.removesuffix(".weight")
        if "_proj" in module:
            rows, columns = plan.pruned_shape(module, shape)
            specs[tensor_name(module, "A")] = TensorSpec((RANK, columns), torch.float32)
            specs[tensor_name(module, "B")] = TensorSpec((rows, RANK), torch.float32)
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 16,
        "target_modules": list(family.target_names()),
    }

    def write(target: StageDirectory) -> None:
        writer = TensorWriter(target.path / ADAPTER_FILE, specs)
        for name, spec in specs.items():
            writer.write(name, torch.randn(spec.shape))
        writer.finish()
        (target.path / CONFIG_FILE).write_text(json.dumps(config))
        plan.save(target.path)

    run_stage(output, "train", {}, {}, identity, write)


def main() -> None:
    folder = Path(sys.argv[1])
    write_sparse_base(folder / "base")
    write_pruned_adapter(folder / "base", folder / "adapter_pruned")
    before = peak_memory()
    recovering, copying = [], []
    for i in range(ROUNDS):
        started = time.perf_counter()
        output = folder / f"adapter_{i}"
        lr.recover(
            lr.RecoverConfig(
                adapter=folder / "adapter_pruned", base=str(folder / "base"), output=output
            )
        )
        recovering.append(time.perf_counter() - started)
        copying.append(timed_copy([output / ADAPTER_FILE], folder / "copy"))
    size = (output / ADAPTER_FILE).stat().st_size
    result = {
        "bytes": size,
        "seconds": median(recovering),
        "copy_seconds": median(copying),
        "ratio": median([a / b for a, b in zip(recovering, copying, strict=True)]),
        "peak_bytes": peak_memory(),
        "peak_before_bytes": before,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
