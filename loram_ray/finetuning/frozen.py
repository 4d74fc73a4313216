"""A model that is loaded once, and copies of its module tree for adapters."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import peft
import torch
from torch import nn
from transformers import PreTrainedModel

from loram_ray.architectures import Architecture
from loram_ray.config import TrainConfig
from loram_ray.finetuning.adapters import new_adapter, save_memory
from loram_ray.losses import summed_loss
from loram_ray.models.files import family_of
from loram_ray.models.loading import load_model

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class FrozenModel:
    """Loaded model for any number of trainings, none of which changes it.

    Attributes:
        model: Model, as returned by `load_model`.
        directory: Directory that the model was loaded from.
        family: Architecture of the model.
        device: Device of the model, ``cuda`` or ``cpu``.
        kind: Precision and attention implementation that the model was loaded with.
        masks: Packed masks in use, by module; shared by all adapters.
    """

    model: PreTrainedModel
    directory: Path
    family: Architecture
    device: str
    kind: tuple[str, str | None]
    masks: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def load(cls, config: TrainConfig) -> FrozenModel:
        """Load the model of a training, on a GPU if there is one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_model(config.model, config.precision, device, config.attention)
        return cls(model, config.model, family_of(config.model), device, _kind(config))

    def serves(self, config: TrainConfig) -> bool:
        """Return whether a training can use this model as it was loaded."""
        return (self.directory, self.kind) == (config.model, _kind(config))

    @contextmanager
    def adapted(self, config: TrainConfig) -> Iterator[peft.PeftModel]:
        """Return a context in which a shell of the model carries a new adapter."""
        torch.manual_seed(config.seed)
        shell = shell_of(self.model)
        model = new_adapter(shell, config.lora, self.family, self.directory, self.masks)
        save_memory(model, config)
        if config.compile:
            for layer in shell.get_submodule(self.family.layers).children():
                layer.compile()
        try:
            yield model
        finally:
            del shell, model
            gc.collect()
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def computing(self) -> torch.autocast:
        """Return a context that computes in the precision that the model was loaded in."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.kind[0] == "bf16")

    def summed_loss(
        self, shell: PreTrainedModel, inputs: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `losses.summed_loss` of a shell, computed in the model's precision.

        Args:
            shell: Shell of the model, with an adapter.
            inputs: Inputs of one batch, as made by `corpus.batches`.
        """
        arguments: dict[str, Any] = {"attention_mask": None, **inputs}
        with self.computing():
            return summed_loss(shell, **arguments)


def _kind(config: TrainConfig) -> tuple[str, str | None]:
    return config.precision, config.attention


def shell_of(module: M) -> M:
    """Return a second module tree that shares parameters and buffers with the first.

    Modules of the shell can be replaced, hooked and configured without changing the original.
    """
    return _shell(module, {})


def _shell(module: M, made: dict[nn.Module, nn.Module]) -> M:
    if module in made:  # registered in two places
        return made[module]  # type: ignore[return-value]
    shell = module.__new__(type(module))
    made[module] = shell
    shell.__dict__ = {
        name: value.copy() if isinstance(value, dict) else value
        for name, value in module.__dict__.items()
    }
    for name, child in module._modules.items():
        shell._modules[name] = None if child is None else _shell(child, made)
    return shell
