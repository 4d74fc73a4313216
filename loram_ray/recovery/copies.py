"""Copies of frozen weights in an adapter's file, which PEFT saves beside A and B of the head."""

from __future__ import annotations

import torch

from loram_ray.architectures import Architecture
from loram_ray.artifacts.adapter import Adapter
from loram_ray.artifacts.tensorfile import Checkpoint
from loram_ray.errors import LoramError


def require_unchanged(adapter: Adapter, model: Checkpoint, family: Architecture) -> None:
    """Check that an adapter's copies of frozen weights equal the weights of its model.

    Args:
        adapter: Open adapter.
        model: Weights of the model that the adapter is for.
        family: Family of the model.

    Raises:
        LoramError: If a copy differs, or is not of the embeddings or the output head.
    """
    for weight, name in adapter.copies.items():
        module = weight.removesuffix(".weight")
        if module not in (family.embeddings, family.output_head):
            raise LoramError(
                f"{adapter.directory} contains tensor {name}, which is not LoRA's A or B of a "
                "linear layer; train LoRA on linear layers only"
            )
        copy, own = adapter.file.read(name), family.weight_name(module, model.specs)
        if own is None or not torch.equal(model.read(own).to(copy.dtype), copy):
            raise LoramError(
                f"{adapter.directory} contains {name}, which differs from {weight} of "
                f"{model.directory}: the vocabulary was resized or the weight was trained, which "
                "LoRA's A and B cannot express; train without it"
            )
