"""The prune stage: base weights stream in, kept rows and columns stream out."""

from __future__ import annotations

from loram_ray.architectures import CoupledLinear
from loram_ray.config import PruneConfig
from loram_ray.errors import LoramError
from loram_ray.manifest import fingerprint, read_model_config
from loram_ray.modeling import family_of, pruned_config, resolve_base, write_model_files
from loram_ray.plan import PruningPlan
from loram_ray.progress import Reporter
from loram_ray.pruning.random import layer_range, random_plan
from loram_ray.stage import StageDirectory, StageResult, require_space, run_stage
from loram_ray.tensorfile import Checkpoint, CheckpointWriter, TensorSpec


def prune(config: PruneConfig) -> StageResult:
    """Prune a base model into a directory that holds the pruned model and its plan.

    One tensor is in memory at a time, whatever the depth of the model.

    Raises:
        LoramError: an unsupported or damaged base, a ratio or layer range that the model cannot
            take, an output that holds something else, a full disk.
    """
    base = resolve_base(config.base, "prune.base")
    family = family_of(base)
    base_config = read_model_config(base)
    if base_config.get("pruned_linears") is not None:
        raise LoramError(f"prune.base must be a model that is not pruned, {base} is; give its base")
    if base_config.get("quantization_config"):
        raise LoramError(
            f"prune.base must be in full precision, {base} is quantised; give the model that was "
            "quantised"
        )
    geometry = family.geometry(base_config)
    layers = layer_range(config.layers, geometry.num_layers)
    with Checkpoint(base) as checkpoint:
        identity = fingerprint(checkpoint)
        plan = random_plan(family, geometry, config.ratio, layers, config.seed, identity)
        _require_linears(plan, checkpoint)
        return run_stage(
            config.output,
            "prune",
            settings=config.model_dump(mode="json", exclude={"base", "output"}),
            parents={"base": identity},
            base_fingerprint=identity,
            write=lambda target: _write(target, checkpoint, plan, config.max_shard_bytes),
        )


def _require_linears(plan: PruningPlan, checkpoint: Checkpoint) -> None:
    """Refuse a base whose tensors are not those that its config.json and its family describe."""
    specs = checkpoint.specs
    for layer in plan.layers:
        modules = plan.architecture.modules(layer, plan.geometry)
        _require_experts(layer, modules, checkpoint)
        for module, _, _ in modules:
            spec, kept = specs.get(f"{module}.weight"), plan.kept(module)
            assert kept is not None
            shape = spec.shape if spec else ()
            if len(shape) != 2 or shape[kept.axis] != kept.full_size:
                found = f"as {shape}" if spec else "not at all"
                raise LoramError(
                    f"prune.base {checkpoint.directory} holds {module}.weight {found}, its "
                    f"config.json says {kept.full_size} along dimension {kept.axis}; download the "
                    "model again"
                )


def _require_experts(
    layer: int, modules: list[tuple[str, CoupledLinear, int | None]], checkpoint: Checkpoint
) -> None:
    """Refuse a layer of a mixture-of-experts family that has attention but no experts."""
    stored = {
        linear.per_expert
        for module, linear, _ in modules
        if f"{module}.weight" in checkpoint.location
    }
    if stored == {False} and any(linear.per_expert for _, linear, _ in modules):
        raise LoramError(
            f"prune.layers must be layers of one kind, layer {layer} of {checkpoint.directory} "
            "has no linears of experts, which the other layers of its family have; leave it out "
            "of prune.layers"
        )


def _write(
    target: StageDirectory, checkpoint: Checkpoint, plan: PruningPlan, max_shard_bytes: int
) -> None:
    base_specs = checkpoint.specs
    specs = {name: _pruned_spec(plan, name, spec) for name, spec in base_specs.items()}
    nbytes = sum(spec.nbytes for spec in specs.values())
    require_space(target.path, nbytes)
    base_config = read_model_config(checkpoint.directory)
    config = pruned_config(base_config, plan, plan.linear_shapes(base_specs))
    write_model_files(checkpoint.directory, target.path, config, plan)
    with (
        Reporter("prune", total=checkpoint.nbytes, unit="B") as reporter,
        CheckpointWriter(target.path, specs, max_shard_bytes) as writer,
    ):
        for name, tensor in checkpoint:
            writer.write(name, plan.select(name, tensor))
            reporter.advance(tensor.nbytes)
    target.hashes.update(writer.hashes)
    target.details.update(
        base_parameters=sum(_numel(spec) for spec in base_specs.values()),
        parameters=sum(_numel(spec) for spec in specs.values()),
        base_bytes=checkpoint.nbytes,
        bytes=nbytes,
        plan=plan.digest,
    )


def _pruned_spec(plan: PruningPlan, name: str, spec: TensorSpec) -> TensorSpec:
    return TensorSpec(plan.pruned_shape(name.rpartition(".")[0], spec.shape), spec.dtype)


def _numel(spec: TensorSpec) -> int:
    return spec.nbytes // spec.dtype.itemsize
