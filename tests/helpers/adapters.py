"""Adapters with random weights, bases with zeroed positions, and Python without loram_ray."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import peft
import torch
from transformers import PreTrainedModel

from loram_ray.architectures import Architecture
from loram_ray.artifacts.stage_directory import StageDirectory, StageResult, run_stage
from loram_ray.finetuning.adapters import save_adapter
from loram_ray.models.base import BaseModel
from loram_ray.models.loading import load_model
from loram_ray.plan import PLAN_FILE, PruningPlan
from loram_ray.pruning.random_scores import random_scores
from loram_ray.pruning.selection import keep_units, layer_ratios
from loram_ray.units import Geometry

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

_BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "loram_ray":
            raise ImportError("loram_ray is not importable here")

sys.meta_path.insert(0, Blocker())
"""


def random_plan(
    family: Architecture,
    geometry: Geometry,
    ratio: float,
    layers: tuple[int, int],
    seed: int,
    base_fingerprint: str,
) -> PruningPlan:
    """Return a random pruning plan, as in LoRAM-Rand."""
    ratios = layer_ratios(ratio, None, layers)
    kept = keep_units(random_scores(family.units, geometry, layers, seed), geometry, ratios)
    return PruningPlan(
        family.model_type, geometry, "random", ratio, seed, layers, base_fingerprint, kept
    )


def token_ids(vocabulary: int, seed: int = 0) -> torch.Tensor:
    """Return random token ids, int64 ``[2, 12]``."""
    return torch.randint(vocabulary, (2, 12), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model: PreTrainedModel | peft.PeftModel, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=ids).logits


def with_random_adapter(
    model: PreTrainedModel, seed: int = 0, **settings: object
) -> peft.PeftModel:
    """Put a LoRA with random A and non-zero random B on a model."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": LINEARS, **settings}
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapted


def write_trained(model: Path, adapted: peft.PeftModel, output: Path) -> StageResult:
    """Write the train stage's output for an adapter on the model in a directory."""
    digest, base_fingerprint = BaseModel(model, "train.model").identify()

    def write(target: StageDirectory) -> None:
        save_adapter(adapted, target.path)
        if (model / PLAN_FILE).exists():
            PruningPlan.load(model).save(target.path)

    return run_stage(output, "train", {}, {"model": digest}, base_fingerprint, write)


def train_randomly(
    model: Path, output: Path, seed: int = 0, **settings: object
) -> tuple[Path, peft.PeftModel]:
    """Write a random adapter of a model; return its directory and the adapted model."""
    adapted = with_random_adapter(load_model(model, "fp32"), seed, **settings)
    return write_trained(model, adapted, output).output, adapted


@torch.no_grad()
def zero_pruned(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    """Zero the heads and neurons that a plan does not keep, one by one."""
    sizes = plan.geometry
    group = sizes.num_heads // sizes.num_kv_heads
    for number, units in plan.layers.items():
        layer = model.model.layers[number]
        attention, mlp = layer.self_attn, layer.mlp
        for head in set(range(sizes.num_kv_heads)) - set(units.kv_heads.tolist()):
            for linear in (attention.k_proj, attention.v_proj):
                _zero_rows(linear, head * sizes.head_dim, sizes.head_dim)
            for query in range(head * group, (head + 1) * group):
                start = query * sizes.head_dim
                _zero_rows(attention.q_proj, start, sizes.head_dim)
                attention.o_proj.weight[:, start : start + sizes.head_dim] = 0
        for neuron in set(range(sizes.intermediate_size)) - set(units.neurons.tolist()):
            for linear in (mlp.gate_proj, mlp.up_proj):
                _zero_rows(linear, neuron, 1)
            mlp.down_proj.weight[:, neuron] = 0
    return model


def _zero_rows(linear: torch.nn.Linear, start: int, count: int) -> None:
    linear.weight[start : start + count] = 0
    if linear.bias is not None:
        linear.bias[start : start + count] = 0


def run_python(script: str, folder: Path, *arguments: object, with_loram_ray: bool) -> None:
    """Run a script in a separate Python process, which may be unable to import loram_ray."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(folder / "modules"),
    }
    code = script if with_loram_ray else _BLOCKER + script
    finished = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert finished.returncode == 0, finished.stderr
