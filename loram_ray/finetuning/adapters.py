"""PEFT adapters on frozen models: creating, configuring and saving them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from loram_ray.architectures import Architecture
from loram_ray.artifacts.adapter import ADAPTER_FILE, CONFIG_FILE
from loram_ray.artifacts.tensorfile import TensorSpec, TensorWriter
from loram_ray.config import LoraConfig, TrainConfig
from loram_ray.errors import LoramError
from loram_ray.finetuning.masked import put_adapter_on
from loram_ray.models.loading import DTYPES

_INITIALISATIONS = {
    "default": True,
    "gaussian": "gaussian",
    "orthogonal": "orthogonal",
    "eva": "eva",
}


def lora_config(config: LoraConfig, family: Architecture) -> peft.LoraConfig:
    """Return an adapter's PEFT configuration; targets default to the family's pruned linears."""
    targets = list(config.targets or family.target_names())
    if config.lm_head:
        targets.append(family.output_head)
    return peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=targets,
        exclude_modules=list(config.exclude) or None,
        layers_to_transform=None if config.layers is None else list(config.layers),
        layers_pattern=None if config.layers is None else family.layers.rpartition(".")[2],
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),  # type: ignore[arg-type]
        use_rslora=config.use_rslora,
        init_lora_weights=_INITIALISATIONS[config.init],  # type: ignore[arg-type]
        eva_config=peft.EvaConfig(rho=1.0) if config.init == "eva" else None,
        task_type="CAUSAL_LM",
    )


def new_adapter(
    frozen: PreTrainedModel,
    config: LoraConfig,
    family: Architecture,
    directory: Path,
    masks: dict[str, torch.Tensor],
) -> peft.PeftModel:
    """Put a new adapter on a model, masked if the model's pruning plan has masks.

    Args:
        frozen: Frozen model.
        config: Configuration of the adapter.
        family: Architecture of the model.
        directory: Directory that the model was loaded from.
        masks: Packed masks by module, shared between adapters; missing masks are added.

    Raises:
        LoramError: The model lacks a target, or does not support the initialisation.
    """
    if config.init == "orthogonal" and getattr(frozen, "is_loaded_in_4bit", False):
        raise LoramError(
            "train.lora.init must be default, gaussian or eva on a quantised model, got "
            "orthogonal, which PEFT computes in the frozen weights' dtype; change it"
        )
    settings = lora_config(config, family)
    try:
        with warnings.catch_warnings():  # a hint about memory that does not apply to empty models
            warnings.filterwarnings("ignore", "lora with eva initialization")
            model = put_adapter_on(frozen, directory, settings, masks)
    except ValueError as error:
        raise LoramError(
            f"train.lora.targets must name linears of the model, got {config.targets} "
            f"({' '.join(str(error).split()):.300}); check the model's module names"
        ) from error
    set_dtype(model, config)
    return model


def set_dtype(model: peft.PeftModel, config: LoraConfig) -> None:
    """Cast the adapter's weights to the configured dtype."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(DTYPES[config.dtype])


def save_memory(model: peft.PeftModel, config: TrainConfig) -> None:
    """Reduce the memory that a model keeps for the backward pass.

    PEFT casts the inputs of a LoRA layer to float32, the dtype of its weights, and autocast casts
    them back. Under autocast this costs memory and changes nothing, so it is turned off. Activation
    checkpointing is enabled if it is configured.
    """
    if config.precision == "bf16":
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.cast_input_dtype_enabled = False  # type: ignore[assignment]
    if config.activation_checkpointing:
        base: PreTrainedModel = model.get_base_model()  # type: ignore[assignment]
        base.activation_checkpointing_enable({"use_reentrant": False})


def save_adapter(model: peft.PeftModel, output: Path) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json``, as PEFT does."""
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(state.items())}
    specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in state.items()}
    writer = TensorWriter(output / ADAPTER_FILE, specs)
    for name, tensor in state.items():
        writer.write(name, tensor)
    writer.finish()
    config = model.peft_config["default"]
    saved = {**config.to_dict(), "inference_mode": True, "auto_mapping": None}
    text = json.dumps(saved, indent=2, sort_keys=True, default=_jsonable)
    (output / CONFIG_FILE).write_text(text + "\n")


def _jsonable(value: object) -> object:
    if isinstance(value, set):
        return sorted(value)
    return str(value)
