"""The recover stage: makes an adapter of the base from an adapter of the pruned model."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loram_ray.artifacts.adapter import (
    ADAPTER_FILE,
    CONFIG_FILE,
    Adapter,
    copy_template,
)
from loram_ray.artifacts.adapter_names import tensor_name
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
from loram_ray.recovery.copies import require_unchanged
from loram_ray.recovery.corrected import (
    Correction,
    corrects,
    require_correctable,
    trained_on,
)
from loram_ray.recovery.experts import adapted_experts, require_fusable_experts
from loram_ray.recovery.masked import write_delta, write_truncated
from loram_ray.recovery.origin import Origin, origin_of
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

    The adapter can come from any trainer of PEFT LoRAs; see `origin_of`. After non-structured
    pruning, the LoRA of an adapter that `train` trained is the best approximation of its rank, and
    the form ``delta`` stores the trained update exactly. Another trainer applies no mask, so its
    adapter fits the base as it is. Only the base's fingerprint and shapes are read. Its weights are
    read for the correction alone, one block of rows at a time.

    This stage runs in the calling process; ``ray_config`` is unused.

    Raises:
        LoramError: The adapter is not of this base, or recovery cannot express it.
    """
    origin = origin_of(config)
    plan = origin.plan
    _require_options(config, origin)
    with ExitStack() as stack:
        base = stack.enter_context(BaseModel.open(config.base, "recover.base"))
        plan.require_base(base.fingerprint, f"recover.base {config.base}")
        adapter = stack.enter_context(Adapter(config.adapter, "recover.adapter"))
        specs = {
            tensor_name(module, side): _recovered_spec(
                adapter, module, side, plan, base.checkpoint.specs
            )
            for module in adapter.modules
            for side in "AB"
        }
        if adapter.copies:
            with ModelCheckpoint(trained_on(config, adapter, origin)) as model:
                require_unchanged(adapter, model, plan.architecture)
        if config.form == "adapter":
            require_fusable_experts(adapter, plan.architecture, base.checkpoint.specs)
        correction = None
        if corrects(config, origin):
            model = stack.enter_context(ModelCheckpoint(trained_on(config, adapter, origin)))
            correction = Correction(base.checkpoint, model, plan, config.correction_lambda)
            stack.enter_context(freed_memory_returned())
        recovery = _Recovery(config, origin, adapter, specs, correction)
        return run_stage(
            config.output,
            "recover",
            settings=recovery.settings,
            parents=recovery.parents,
            base_fingerprint=plan.base_fingerprint,
            write=recovery.write,
            reads=(config.adapter, config.base, config.model),
        )


@dataclass(frozen=True)
class _Recovery:
    """A recovery whose inputs were checked.

    Attributes:
        config: Configuration of the stage.
        origin: Origin of the adapter.
        adapter: The open adapter.
        specs: Shape and dtype of each recovered tensor, by name.
        correction: Correction to apply, if any.
    """

    config: RecoverConfig
    origin: Origin
    adapter: Adapter
    specs: dict[str, TensorSpec]
    correction: Correction | None

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that determine the result."""
        if self.origin.masked:
            return {"form": self.config.form, "svd_rank": self.config.svd_rank}
        if self.correction is not None:
            return {"correction": True, "correction_lambda": self.config.correction_lambda}
        return {}

    @property
    def parents(self) -> dict[str, str]:
        """Digest of each input, by role."""
        parents = {"adapter": self.origin.digest, "base": self.origin.plan.base_fingerprint}
        if self.correction is not None or self.origin.elsewhere:
            parents["model"] = self.origin.model
        return parents

    def write(self, target: StageDirectory) -> None:
        """Write the recovered adapter or its dense delta."""
        plan, adapter = self.origin.plan, self.adapter
        shapes = {module: _shape_of(module, self.specs) for module in adapter.modules}
        if not self.origin.masked:
            _write(target, adapter, plan, self.specs, self.config.base, self.correction)
        elif self.config.form == "delta":
            write_delta(target, adapter, plan, shapes)
        else:
            write_truncated(target, adapter, plan, shapes, self.config)
        copy_template(adapter.directory, target.path)
        target.details.update(self.origin.details)
        if self.config.form == "adapter":
            with Adapter(target.path, "recover.output") as recovered:
                target.details["vllm"] = serving_note(recovered, plan.architecture)


def _require_options(config: RecoverConfig, origin: Origin) -> None:
    """Raise an error for options that do not apply to the adapter's kind of pruning."""
    if not origin.masked and (config.form == "delta" or config.svd_rank is not None):
        key = "form must be adapter" if config.form == "delta" else "svd_rank must be left out"
        why = f"for a structured pruning, which {config.adapter} was trained under"
        if origin.plan.masks is not None:
            why = f"for {config.adapter}, which another trainer trained without the masks"
        raise LoramError(
            f"recover.{key} {why} and which is recovered exactly; remove recover.form and "
            "recover.svd_rank"
        )
    if config.correction:
        which = f"{config.adapter} was trained under"
        require_correctable(origin.plan, "recover.correction", which)


def _recovered_spec(
    adapter: Adapter, module: str, side: str, plan: PruningPlan, base_specs: dict[str, TensorSpec]
) -> TensorSpec:
    """Return a recovered tensor's shape; raise an error if the plan and the base do not match."""
    spec = adapter.specs[tensor_name(module, side)]
    kept = plan.kept(module)
    axis = 0 if side == "B" else 1
    shape = list(spec.shape)
    full = expected = _base_weight(module, plan, base_specs).shape[axis]
    if is_scattered(side, kept):
        assert kept is not None
        expected, shape[axis] = len(kept.index), kept.full_size
    if spec.shape[axis] != expected:
        remedy = "use the plan and the base that it was trained under"
        if spec.shape[axis] == full:
            remedy = "it has the base's own size; an adapter of the base needs no recovery"
        raise LoramError(
            f"{adapter.directory} has {tuple(spec.shape)} for lora_{side} of {module}, but its "
            f"plan and the base require {expected} along dimension {axis}; {remedy}"
        )
    return TensorSpec(tuple(shape), spec.dtype)


def _shape_of(module: str, specs: dict[str, TensorSpec]) -> tuple[int, int]:
    """Return the shape ``[out, in]`` of the weight that a module's tensors change."""
    rows, columns = (specs[tensor_name(module, side)].shape for side in "BA")
    return rows[0], columns[1]


def _base_weight(module: str, plan: PruningPlan, base_specs: dict[str, TensorSpec]) -> TensorSpec:
    """Return the base's weight of a module; for a tied output head, the embedding's."""
    name = plan.architecture.weight_name(module, base_specs)
    if name is None:
        raise LoramError(
            f"the adapter changes {module}, which the base does not have; check the base"
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
        "target_modules": adapter.targets(),
    }
    if adapted_experts(adapter, plan.architecture):
        config["lora_dropout"] = 0.0  # PEFT rejects it on fused experts, inference has none
    (target.path / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    target.details.update(
        parameters=sum(spec.nbytes // spec.dtype.itemsize for spec in specs.values()),
        trained_parameters=sum(s.nbytes // s.dtype.itemsize for s in adapter.specs.values()),
        modules=len(adapter.modules),
        **({} if correction is None else correction.details()),
    )
