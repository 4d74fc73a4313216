"""Tensors of a directory as they are stored; NF4 tensors are decoded by the definition."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file


def stored(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.glob("model*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def decoded(directory: Path, name: str) -> torch.Tensor:
    """Decode a weight element by element, by the definition of NF4 with double quantisation."""
    parts = {stem: tensor for stem, tensor in stored(directory).items() if stem.startswith(name)}
    state = json.loads(bytes(parts[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))
    packed = parts[name].flatten()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten().long()
    scale_codes = parts[f"{name}.nested_quant_map"][parts[f"{name}.absmax"].long()]
    of_scales = parts[f"{name}.nested_absmax"].repeat_interleave(256)[: len(scale_codes)]
    scales = scale_codes * of_scales + state["nested_offset"]
    flat = parts[f"{name}.quant_map"][codes] * scales.repeat_interleave(64)[: len(codes)]
    return flat.reshape(state["shape"])
