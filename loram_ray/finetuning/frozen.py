"""A model that is loaded once, and the copies of its module tree that trainings put adapters on."""

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
    """A loaded model for any number of trainings, none of which changes it.

    Attributes:
        model: as `load_model` returns it.
        directory: where from.
        family: its family.
        device: where it is.
        kind: precision and attention that it was loaded with.
        masks: those in use, by module; all adapters share them.
    """

    model: PreTrainedModel
    directory: Path
    family: Architecture
    device: str
    kind: tuple[str, str | None]
    masks: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def load(cls, config: TrainConfig) -> FrozenModel:
        """Load the model of a training, on a GPU where there is one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_model(config.model, config.precision, device, config.attention)
        return cls(model, config.model, family_of(config.model), device, _kind(config))

    def serves(self, config: TrainConfig) -> bool:
        """Whether a training asks for this model, loaded as it is."""
        return (self.directory, self.kind) == (config.model, _kind(config))

    @contextmanager
    def adapted(self, config: TrainConfig) -> Iterator[peft.PeftModel]:
        """Have a new adapter on a shell of the model inside the block."""
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
        """Compute inside the block in the precision that the model was loaded in."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.kind[0] == "bf16")

    def summed_loss(
        self, shell: PreTrainedModel, inputs: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`losses.summed_loss` of a shell, in that precision.

        Args:
            shell: of the model, with an adapter.
            inputs: of one batch, as `corpus.batches` makes them.
        """
        arguments: dict[str, Any] = {"attention_mask": None, **inputs}
        with self.computing():
            return summed_loss(shell, **arguments)


def _kind(config: TrainConfig) -> tuple[str, str | None]:
    return config.precision, config.attention


def shell_of(module: M) -> M:
    """Another tree of modules over the very same parameters and buffers.

    Modules can be replaced in it, hooked and configured without a change to the first.
    """
    return _shell(module, {})


def _shell(module: M, made: dict[nn.Module, nn.Module]) -> M:
    if module in made:  # registered at two places
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
