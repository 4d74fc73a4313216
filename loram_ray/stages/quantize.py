"""The quantize stage: converts a pruned or aligned model to NF4."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from loram_ray.artifacts.manifest import (
    Manifest,
    read_manifest,
    require_sizes,
    require_stage,
)
from loram_ray.artifacts.stage_directory import (
    StageDirectory,
    StageResult,
    require_space,
    run_stage,
)
from loram_ray.artifacts.tensorfile import Checkpoint, CheckpointWriter, TensorSpec
from loram_ray.config import QuantizeConfig, RayConfig
from loram_ray.errors import LoramError
from loram_ray.models.base import BaseModel
from loram_ray.models.files import write_model_files
from loram_ray.models.quantisation import NF4, Quantisation
from loram_ray.plan import PruningPlan
from loram_ray.runtime.progress import Reporter
from loram_ray.stages.model_card import CARD_FILE, SIZES, pruned_card, quantized_card
from loram_ray.utils.parsing import read_text


def quantize(config: QuantizeConfig, ray_config: RayConfig | None = None) -> StageResult:
    """Write a model's linears in NF4 with double quantisation, for QLoRAM's low-memory training.

    The weights are read twice, one at a time, and quantised on a GPU if there is one. The output
    loads with ``AutoModelForCausalLM.from_pretrained``, and `train` accepts it.

    This stage runs in the calling process; ``ray_config`` is unused.

    Raises:
        LoramError: The model is not structurally pruned or aligned, or it is damaged.
    """
    _refuse_quantized(config.model)
    manifest = require_stage(config.model, ("prune", "align"), "quantize.model")
    require_sizes(config.model, manifest, SIZES)
    plan = PruningPlan.load(config.model)
    if plan.masks is not None:
        raise LoramError(
            f"quantize.model must be structurally pruned, but {config.model} has {plan.pattern} "
            "masks, which need full precision; prune with a structured method"
        )
    form = NF4
    with BaseModel(config.model, "quantize.model") as model:
        return run_stage(
            config.output,
            "quantize",
            settings={**form.settings, "max_shard_bytes": config.max_shard_bytes},
            parents={"model": manifest.digest},
            base_fingerprint=manifest.base_fingerprint,
            write=lambda target: _write(target, config, model, plan, manifest, form),
            reads=(config.model,),
        )


def _refuse_quantized(model: Path) -> None:
    """Raise an error with a specific message for a model that is already quantised."""
    manifest = read_manifest(model)
    if manifest is not None and manifest.stage == "quantize":
        raise LoramError(
            f"quantize.model must be in full precision, but {model} is already quantised; use the "
            "model that it was quantised from"
        )


@dataclass(frozen=True)
class _Outline:
    """Outline of the output.

    Attributes:
        specs: Specification of every tensor, in order.
        parts: Suffixes of the stored tensor names, by the name of the quantised weight.
    """

    specs: dict[str, TensorSpec]
    parts: dict[str, list[str]]


def _write(
    target: StageDirectory,
    config: QuantizeConfig,
    model: BaseModel,
    plan: PruningPlan,
    source: Manifest,
    form: Quantisation,
) -> None:
    from loram_ray.models.nf4 import quantization_config, quantize_weight

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint, before = model.checkpoint, model.checkpoint.specs
    with Reporter("quantize", total=2 * checkpoint.nbytes, unit="B") as reporter:
        outline = _outline(checkpoint, config.model, device, reporter, form)
        specs = outline.specs
        require_space(target.path, sum(spec.nbytes for spec in specs.values()))
        settings = {**model.config, "quantization_config": quantization_config(form).to_dict()}
        write_model_files(config.model, target.path, settings, plan)
        with CheckpointWriter(target.path, specs, config.max_shard_bytes) as writer:
            for name, spec in before.items():
                tensor = checkpoint.read(name)
                if name in outline.parts:
                    stored = quantize_weight(tensor.to(device), form=form)
                    for part in outline.parts[name]:
                        writer.write(f"{name}{part}", stored[part])
                else:
                    writer.write(name, tensor)
                reporter.advance(spec.nbytes)
    target.hashes.update(writer.hashes)
    quantized = sum(math.prod(before[name].shape) for name in outline.parts)
    kept = sum(spec.nbytes for name, spec in before.items() if name not in outline.parts)
    target.details.update(
        {key: source.details[key] for key in SIZES},
        bytes=sum(spec.nbytes for spec in specs.values()),
        bytes_before=checkpoint.nbytes,
        nominal_bytes=kept + quantized * form.bits // 8,
        quantized_tensors=len(outline.parts),
        quantized_parameters=quantized,
    )
    name, path = config.output.name, config.model / CARD_FILE
    card = read_text(path) if path.exists() else pruned_card(config.base, plan, source, name)
    (target.path / CARD_FILE).write_text(quantized_card(card, name, target.details, form), "utf-8")


def _outline(
    checkpoint: Checkpoint,
    directory: Path,
    device: torch.device,
    reporter: Reporter,
    form: Quantisation,
) -> _Outline:
    """Determine what will be stored: headers precede values, and some lengths depend on values.

    Raises:
        LoramError: A linear is not stored, or has a dtype that cannot be quantised.
    """
    from loram_ray.models.nf4 import QUANTIZABLE, linears_to_quantize, scales, stored_specs

    weights = {f"{linear}.weight" for linear in linears_to_quantize(directory)}
    for name in sorted(weights):
        found = checkpoint.specs.get(name)
        if found is None or found.dtype not in QUANTIZABLE:
            how = "lacks it" if found is None else f"stores it as {found.dtype}"
            raise LoramError(
                f"quantize.model must contain {name} in floating point, but {directory} {how}; run "
                "the stage that wrote it again"
            )
    outline = _Outline({}, {})
    for name, spec in checkpoint.specs.items():
        if name not in weights:
            outline.specs[name] = spec
        else:
            mean_scale = scales(checkpoint.read(name).to(device)).mean()
            stored = stored_specs(spec, mean_scale, form)
            outline.parts[name] = list(stored)
            outline.specs.update({f"{name}{part}": found for part, found in stored.items()})
        reporter.advance(spec.nbytes)
    return outline
