"""Pruning a synthetic Llama at random, against a plain copy; peak memory at 8 and 32 layers.

python tests/benchmarks/pruning.py FOLDER LAYERS
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from measure import median, peak_memory, timed_copy

import loram_ray as lr
from loram_ray.artifacts.tensorfile import CheckpointWriter, TensorSpec

ROUNDS, RATIO = 3, 0.65
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 2048, 8192, 32, 8, 64, 32000


def write_base(directory: Path, layers: int) -> None:
    directory.mkdir()
    config = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
    }
    (directory / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        for name, shape in {
            "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
            "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
            "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
            "mlp.up_proj": (INTERMEDIATE, HIDDEN),
            "mlp.down_proj": (HIDDEN, INTERMEDIATE),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
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
