"""Recovery with the correction on LLaMA-3.1-70B's shapes: peak memory against one layer's.

python tests/benchmarks/correction.py write FOLDER LAYERS whole|nf4
python tests/benchmarks/correction.py recover FOLDER

The first LAYERS of the 80, all but the first pruned at 0.85, r 8 on all seven linears and lm_head.
The base has its real shapes as a sparse file: its weights are zero, and take no disk. The model
that the adapter was trained on has random weights in bf16, or NF4, and no embedding: 5.8 GB of disk
for 8 layers in bf16. Linears of one shape have the same values, which are quicker to draw.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import recovery
import torch
from measure import peak_memory, reset_peak_memory

import loram_ray as lr
from loram_ray.architectures import architecture_of
from loram_ray.artifacts.adapter import ADAPTER_FILE, CONFIG_FILE
from loram_ray.artifacts.adapter_names import tensor_name
from loram_ray.artifacts.manifest import fingerprint, read_model_config
from loram_ray.artifacts.stage_directory import StageDirectory, run_stage
from loram_ray.artifacts.tensorfile import Checkpoint, TensorSpec, TensorWriter
from loram_ray.models.nf4 import quantize_weight
from loram_ray.plan import PruningPlan
from loram_ray.pruning.random_scores import random_scores
from loram_ray.pruning.selection import keep_units, layer_ratios

RATIO, RANK = 0.85, 8


def adapted_shapes(plan: PruningPlan) -> dict[str, tuple[int, ...]]:
    """Pruned shape ``[out, in]`` of each linear, those of one shape one after another."""
    shapes = {name.removesuffix(".weight"): s for name, s in recovery.base_shapes().items()}
    linears = {
        m: plan.pruned_shape(m, s) for m, s in shapes.items() if m[-5:] in ("_proj", "_head")
    }
    return dict(sorted(linears.items(), key=lambda item: item[1]))


def make_plan(base: Path) -> PruningPlan:
    with Checkpoint(base) as checkpoint:
        identity = fingerprint(checkpoint)
    family = architecture_of("llama")
    geometry = family.geometry(read_model_config(base))
    layers = (1, geometry.num_layers)
    scores, ratios = (
        random_scores(family.units, geometry, layers, 0),
        layer_ratios(RATIO, None, layers),
    )
    kept = keep_units(scores, geometry, ratios)
    return PruningPlan("llama", geometry, "random", RATIO, 0, layers, identity, kept)


def write_model(plan: PruningPlan, output: Path, nf4: bool) -> str:
    """Write what the adapter was trained on; return its digest."""
    drawn: dict[tuple[int, ...], dict[str, torch.Tensor]] = {}

    def parts_of(module: str, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
        if shape not in drawn:
            drawn.clear()
            torch.manual_seed(0)
            weight = torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)
            packed = nf4 and not module.endswith("_head")
            drawn[shape] = quantize_weight(weight) if packed else {"": weight}
        return drawn[shape]

    shapes = adapted_shapes(plan)
    specs = {
        f"{module}.weight{part}": TensorSpec(tuple(tensor.shape), tensor.dtype)
        for module, shape in shapes.items()
        for part, tensor in parts_of(module, shape).items()
    }

    def write(target: StageDirectory) -> None:
        writer = TensorWriter(target.path / "model.safetensors", specs)
        for module, shape in shapes.items():
            for part, tensor in parts_of(module, shape).items():
                writer.write(f"{module}.weight{part}", tensor)
        target.hashes["model.safetensors"] = writer.finish()

    stage = "quantize" if nf4 else "align"
    return run_stage(output, stage, {}, {}, plan.base_fingerprint, write).manifest.digest


def write_adapter(plan: PruningPlan, output: Path, model: Path, digest: str) -> None:
    specs = {}
    for module, (rows, columns) in adapted_shapes(plan).items():
        specs[tensor_name(module, "A")] = TensorSpec((RANK, columns), torch.float32)
        specs[tensor_name(module, "B")] = TensorSpec((rows, RANK), torch.float32)
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 16,
        "target_modules": [*architecture_of("llama").target_names(), "lm_head"],
        "base_model_name_or_path": str(model),
    }

    def write(target: StageDirectory) -> None:
        writer = TensorWriter(target.path / ADAPTER_FILE, specs)
        for name, spec in specs.items():
            writer.write(name, 0.02 * torch.randn(spec.shape))
        writer.finish()
        (target.path / CONFIG_FILE).write_text(json.dumps(config))
        plan.save(target.path)

    run_stage(output, "train", {}, {"model": digest}, plan.base_fingerprint, write)


def write_inputs(folder: Path, layers: int, kind: str) -> dict[str, object]:
    recovery.LAYERS = layers
    recovery.write_sparse_base(folder / "base")
    plan = make_plan(folder / "base")
    digest = write_model(plan, folder / "model", kind == "nf4")
    write_adapter(plan, folder / "adapter_pruned", folder / "model", digest)
    return {}


def recover(folder: Path) -> dict[str, object]:
    before = reset_peak_memory()
    started = time.perf_counter()
    result = lr.recover(
        lr.RecoverConfig(
            adapter=folder / "adapter_pruned",
            base=str(folder / "base"),
            output=folder / "adapter",
            correction=True,
        )
    )
    with Checkpoint(folder / "base") as base:
        specs = {n: s for n, s in base.specs.items() if n.startswith("model.layers.0.")}
    return {
        "layer_bytes": sum(spec.nbytes for spec in specs.values()),
        "model_bytes": (folder / "model" / "model.safetensors").stat().st_size,
        "corrected": result.manifest.details["corrected_modules"],
        "seconds": time.perf_counter() - started,
        "peak_bytes": peak_memory() - before,
        "peak_before_bytes": before,
    }


def main() -> None:
    step, folder = sys.argv[1], Path(sys.argv[2])
    if step == "write":
        result = write_inputs(folder, int(sys.argv[3]), sys.argv[4])
    else:
        result = recover(folder)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
