"""Models pruned to masks, masked adapters on them, and the adapters' updates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file

import loram_ray as lr
from helpers import tiny
from helpers.adapters import LINEARS, write_trained
from loram_ray.finetuning.masked import put_adapter_on
from loram_ray.models.loading import load_model
from loram_ray.plan import PruningPlan

PREFIX = "base_model.model."
# Settings of the adapter, by pattern: both scales, and separate ranks and alphas.
SETTINGS: dict[str, dict[str, object]] = {
    "2:4": {"use_rslora": True},
    "unstructured": {
        "target_modules": [*LINEARS, "lm_head"],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"down_proj": 3},
    },
}


def prune(base: Path, output: Path, pattern: str = "2:4", **settings: object) -> Path:
    settings = {"method": "magnitude", "layers": (1, 3), **settings}
    config = lr.PruneConfig(base=str(base), output=output, pattern=pattern, **settings)
    return lr.prune(config).output


def lora_settings(**settings: object) -> peft.LoraConfig:
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": LINEARS, "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**{**defaults, **settings})


def adapt(pruned: Path, **settings: object) -> peft.PeftModel:
    """Return the pruned model with a random masked LoRA, as the train stage creates it."""
    adapted = put_adapter_on(load_model(pruned, "fp32"), pruned, lora_settings(**settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapted


@dataclass(frozen=True)
class Case:
    """A base, its masked model, and a random adapter trained on the masked model."""

    base: Path
    pruned: Path
    adapted: peft.PeftModel
    trained: Path

    @property
    def plan(self) -> PruningPlan:
        return PruningPlan.load(self.pruned)

    def products(self) -> dict[str, torch.Tensor]:
        """Return the adapter's update of each weight; see `products`."""
        return products(self.trained, self.plan, scales(self.adapted))

    def retrained(self, output: Path, dtype: torch.dtype) -> Case:
        """Return the case with the adapter stored in another dtype."""
        for name, parameter in self.adapted.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
        trained = write_trained(self.pruned, self.adapted, output).output
        return replace(self, trained=trained)

    def recover(self, output: Path, **settings: object) -> Path:
        config = lr.RecoverConfig(
            adapter=self.trained, base=str(self.base), output=output, **settings
        )
        return lr.recover(config).output


def make_case(folder: Path, pattern: str, base: Path | None = None, **settings: object) -> Case:
    """Create a case with the adapter's settings, and a base unless one is given."""
    base = base or tiny.write_base(folder / "base", seed=4)
    pruned = prune(base, folder / "pruned", pattern)
    adapted = adapt(pruned, **(settings or SETTINGS[pattern]))
    trained = write_trained(pruned, adapted, folder / "trained").output
    return Case(base, pruned, adapted, trained)


def scales(adapted: peft.PeftModel) -> dict[str, float]:
    """Return PEFT's scale of each adapted module."""
    return {
        name.removeprefix(PREFIX): module.scaling["default"]
        for name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }


def products(adapter: Path, plan: PruningPlan, scales: dict[str, float]) -> dict[str, torch.Tensor]:
    """Return ``s * (B A) * M`` of each adapted module, computed naively from the files."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for name in [n for n in tensors if "lora_A" in n]:
        module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        product = tensors[name.replace("lora_A", "lora_B")].float() @ tensors[name].float()
        mask = plan.mask(module)
        product = product * scales[module]
        found[module] = product if mask is None else product * mask
    return found


def weights(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.glob("model*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
