"""The recover stage: makes an adapter of the base from an adapter of the pruned model."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from loram_ray.artifacts.adapter import (
    ADAPTER_FILE,
    CONFIG_FILE,
    Adapter,
    copy_template,
    split_name,
    tensor_name,
)
from loram_ray.artifacts.manifest import require_stage
from loram_ray.artifacts.stage_directory import (
    StageDirectory,
    StageResult,
    require_space,
    run_stage,
)
from loram_ray.artifacts.tensorfile import TensorSpec, TensorWriter
from loram_ray.config import RayConfig, RecoverConfig
from loram_ray.errors import LoramError
from loram_ray.models.base import BaseModel
from loram_ray.models.weights import ModelCheckpoint
from loram_ray.plan import PruningPlan
from loram_ray.recovery.corrected import (
    Correction,
    corrects,
    require_correctable,
    trained_on,
)
from loram_ray.recovery.experts import adapted_experts, require_fusable_experts
from loram_ray.recovery.masked import write_delta, write_truncated
from loram_ray.recovery.scatter import is_scattered, recover_tensor
from loram_ray.recovery.vllm import serving_note
from loram_ray.runtime.memory import freed_memory_returned
from loram_ray.runtime.progress import Reporter


def recovery_in(
    folder: Path, model: Path, base: str | None, correction: bool | None
) -> tuple[Path, RecoverConfig | None]:
    """Return the output directory of a training, and the configuration of its recovery.

    Args:
        folder: Directory of the training. Its ``adapter`` is the final adapter.
        model: Model to train on.
        base: Base to recover for, or None.
        correction: Setting of the same name in `RecoverConfig`.

    Returns:
        The training's output directory, and None if there is nothing to recover.
    """
    adapter = folder / "adapter"
    if base is None or not PruningPlan.is_in(model):
        return adapter, None
    trained = folder / "adapter_pruned"
    recovery = RecoverConfig(adapter=trained, base=base, output=adapter, correction=correction)
    return trained, recovery


def require_recovery(model: Path, correction: bool | None, key: str) -> None:
    """Raise an error before training if recovery would fail after it.

    Args:
        model: Model to train on.
        correction: Setting of the same name in `RecoverConfig`.
        key: Configuration key of the setting, for messages.

    Raises:
        LoramError: A correction is requested after non-structured pruning.
    """
    plan = PruningPlan.load_if_any(model) if correction else None
    if plan is not None:
        require_correctable(plan, key, f"{model} has")


def recover(config: RecoverConfig, ray_config: RayConfig | None = None) -> StageResult:
    """Recover an adapter for the base from an adapter of the pruned model, as a standard PEFT LoRA.

    After non-structured pruning, this LoRA is the best approximation of its rank; the form
    ``delta`` stores the trained update exactly. Only the base's fingerprint and shapes are read.
    Its weights are read for the correction alone, one block of rows at a time.

    This stage runs in the calling process; ``ray_config`` is unused.

    Raises:
        LoramError: The adapter is not of this base, or recovery cannot express it.
    """
    manifest = require_stage(config.adapter, ("train",), "recover.adapter")
    plan = PruningPlan.load(config.adapter)
    masked = plan.masks is not None
    _require_options(config, plan)
    with ExitStack() as stack:
        base = stack.enter_context(BaseModel.open(config.base, "recover.base"))
        plan.require_base(base.fingerprint, f"recover.base {config.base}")
        base_specs = base.checkpoint.specs
        adapter = stack.enter_context(Adapter(config.adapter, "recover.adapter"))
        specs = {}
        for name in (tensor_name(module, side) for module in adapter.modules for side in "AB"):
            spec = adapter.file.specs[name]
            specs[name] = _recovered_spec(adapter, name, spec, plan, base_specs)
        if config.form == "adapter":
            require_fusable_experts(adapter, plan.architecture, base_specs)
        shapes = {m: _shape_of(m, adapter, specs) for m in adapter.modules}
        settings: dict[str, Any] = {}
        parents = {"adapter": manifest.digest, "base": plan.base_fingerprint}
        correction = None
        if masked:
            settings = {"form": config.form, "svd_rank": config.svd_rank}
        elif corrects(config, manifest):
            settings = {"correction": True, "correction_lambda": config.correction_lambda}
            parents["model"] = manifest.parents.get("model", "unknown")
            model = stack.enter_context(ModelCheckpoint(trained_on(config, adapter, manifest)))
            correction = Correction(base.checkpoint, model, plan, config.correction_lambda)
            stack.enter_context(freed_memory_returned())

        def write(target: StageDirectory) -> None:
            if not masked:
                _write(target, adapter, plan, specs, config.base, correction)
            elif config.form == "delta":
                write_delta(target, adapter, plan, shapes)
            else:
                write_truncated(target, adapter, plan, shapes, config)
            copy_template(adapter.directory, target.path)
            if config.form == "adapter" or not masked:
                with Adapter(target.path, "recover.output") as recovered:
                    target.details["vllm"] = serving_note(recovered, plan.architecture)

        return run_stage(
            config.output,
            "recover",
            settings=settings,
            parents=parents,
            base_fingerprint=plan.base_fingerprint,
            write=write,
            reads=(config.adapter, config.base, config.model),
        )


def _require_options(config: RecoverConfig, plan: PruningPlan) -> None:
    """Raise an error for options that do not apply to the adapter's kind of pruning."""
    if plan.masks is None and (config.form == "delta" or config.svd_rank is not None):
        key = "form must be adapter" if config.form == "delta" else "svd_rank must be left out"
        raise LoramError(
            f"recover.{key} for a structured pruning, which {config.adapter} was trained under: "
            "it is recovered exactly; leave recover.form and recover.svd_rank out"
        )
    if config.correction:
        require_correctable(plan, "recover.correction", f"{config.adapter} was trained under")


def _recovered_spec(
    adapter: Adapter,
    name: str,
    spec: TensorSpec,
    plan: PruningPlan,
    base_specs: dict[str, TensorSpec],
) -> TensorSpec:
    """Return a recovered tensor's shape; raise an error if the plan and the base do not match."""
    module, side = split_name(name, adapter.directory)
    kept = plan.kept(module)
    axis = 0 if side == "B" else 1
    shape = list(spec.shape)
    if is_scattered(side, kept):
        assert kept is not None
        expected, shape[axis] = len(kept.index), kept.full_size
    else:
        expected = _base_weight(module, plan, base_specs).shape[axis]
    if spec.shape[axis] != expected:
        raise LoramError(
            f"{adapter.directory} has {tuple(spec.shape)} for lora_{side} of {module}, its plan "
            f"and the base expect {expected} along dimension {axis}; use the plan and the base "
            "that it was trained under"
        )
    return TensorSpec(tuple(shape), spec.dtype)


def _shape_of(module: str, adapter: Adapter, specs: dict[str, TensorSpec]) -> tuple[int, int]:
    """Return the shape ``[out, in]`` of the weight that an adapter's tensors change."""
    rows, columns = (specs[tensor_name(module, side)].shape for side in "BA")
    return rows[0], columns[1]


def _base_weight(module: str, plan: PruningPlan, base_specs: dict[str, TensorSpec]) -> TensorSpec:
    """Return the base's weight of a module; for a tied output head, the embedding's."""
    name = plan.architecture.weight_name(module, base_specs)
    if name is None:
        raise LoramError(
            f"the adapter adapts {module}, the base has no such module; check the base"
        )
    return base_specs[name]


def _write(
    target: StageDirectory,
    adapter: Adapter,
    plan: PruningPlan,
    specs: dict[str, TensorSpec],
    base: str,
    correction: Correction | None,
) -> None:
    nbytes = sum(spec.nbytes for spec in specs.values())
    require_space(target.path, nbytes)
    writer = TensorWriter(target.path / ADAPTER_FILE, specs)
    scratch: dict[TensorSpec, torch.Tensor] = {}  # one per shape, as reused memory is fast
    try:
        with Reporter("recover", total=nbytes, unit="B") as reporter:
            for module in adapter.modules:
                a, b = (adapter.read(module, side) for side in "AB")
                if correction is not None:
                    a, b = correction.pair(module, a, b, adapter.scale(module))
                for side, tensor in (("A", a), ("B", b)):
                    name = tensor_name(module, side)
                    out = scratch.setdefault(specs[name], specs[name].empty())
                    writer.write(name, recover_tensor(tensor, side, plan.kept(module), out))
                    reporter.advance(specs[name].nbytes)
        target.hashes[ADAPTER_FILE] = writer.finish()
    except BaseException:
        writer.abort()
        raise
    config = {
        **adapter.config,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "auto_mapping": None,
    }
    if adapted_experts(adapter, plan.architecture):
        config["lora_dropout"] = 0.0  # PEFT rejects it on fused experts, inference has none
    (target.path / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    target.details.update(
        parameters=sum(spec.nbytes // spec.dtype.itemsize for spec in specs.values()),
        trained_parameters=sum(s.nbytes // s.dtype.itemsize for s in adapter.file.specs.values()),
        modules=len(adapter.modules),
        **({} if correction is None else correction.details()),
    )
