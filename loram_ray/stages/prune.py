"""The prune stage: streams base weights in, and the kept weights out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open

from loram_ray.architectures import Architecture, CoupledLinear
from loram_ray.artifacts.manifest import digest_of, require_stage
from loram_ray.artifacts.stage_directory import (
    StageDirectory,
    StageResult,
    require_space,
    run_stage,
)
from loram_ray.artifacts.tensorfile import Checkpoint, CheckpointWriter, TensorSpec, TensorWriter
from loram_ray.config import PruneConfig, RayConfig
from loram_ray.corpus.prepare import digest_of_tokenizer
from loram_ray.corpus.read import identify
from loram_ray.criteria import STRUCTURED
from loram_ray.errors import LoramError
from loram_ray.masks import MASKS_FILE, Masks, packed_spec
from loram_ray.models.base import BaseModel
from loram_ray.models.files import NORM_MEAN, pruned_config, write_model_files
from loram_ray.models.tokenizer import frame_of, load_tokenizer
from loram_ray.plan import PruningPlan
from loram_ray.pruning.calibration import sparsified_file
from loram_ray.pruning.criteria import LayerScores, layer_linears
from loram_ray.pruning.driver import sparsify_weights, structured_scores
from loram_ray.pruning.scores import SCORES_FILE, load_scores, save_scores
from loram_ray.pruning.selection import keep_units, kept_counts, layer_range, layer_ratios
from loram_ray.pruning.sparse import Pattern
from loram_ray.pruning.text import KEY
from loram_ray.runtime.progress import Reporter


def prune(config: PruneConfig, ray_config: RayConfig | None = None) -> StageResult:
    """Prune a base model into a directory with the pruned model and its pruning plan.

    Random and magnitude pruning read one tensor at a time. The other criteria run the base over
    calibration text, in Ray actors, with one decoder layer in memory at a time, regardless of the
    model's depth. An interrupted calibration resumes at its layer.

    Raises:
        LoramError: The base is unsupported or damaged, the model does not support a ratio, pattern
            or layer range, there is too little text, the output holds something else, or the disk
            is full.
    """
    base = BaseModel.open(config.base, "prune.base")
    geometry = base.geometry
    base.require_full()
    layers = layer_range(config.layers, geometry.num_layers)
    with base:
        identity = base.fingerprint
        ratios = layer_ratios(config.ratio, config.ratios, layers)
        _require_layers(base, layers)
        if config.pattern == STRUCTURED:
            kept_counts(base.family.units, geometry, ratios, config.round_neurons_to)
        else:
            ratios = _require_pattern(base, Pattern.parse(config.pattern), ratios)
        work = _Pruning(config, base, layers, ratios, ray_config or RayConfig())
        return run_stage(
            config.output,
            "prune",
            settings=_settings(config, base.family),
            parents=_parents(config, base),
            base_fingerprint=identity,
            write=work.write,
            reads=(config.base, config.scores, *_texts(config)),
        )


def _texts(config: PruneConfig) -> list[str]:
    """Return the paths of the calibration text."""
    return [source.path for source in config.calibration.sources] if config.calibration else []


def _settings(config: PruneConfig, family: Architecture) -> dict[str, Any]:
    """Return the settings that determine the result, besides the inputs."""
    settings = config.identity()
    if family.norms and config.pattern == STRUCTURED:
        settings["norm_mean"] = NORM_MEAN
    return settings if config.calibrates else {**settings, "calibration": None}


def _parents(config: PruneConfig, base: BaseModel) -> dict[str, str]:
    """Return the digests of the pruned model's inputs."""
    identity = base.fingerprint
    parents = {"base": identity}
    if config.scores is not None:
        manifest = require_stage(config.scores, ("prune",), "prune.scores")
        if manifest.base_fingerprint != identity:
            raise LoramError(
                f"prune.scores must be for prune.base, fingerprint {identity[:12]}, but "
                f"{config.scores} is for {manifest.base_fingerprint[:12]}; use scores of this base"
            )
        parents["scores"] = manifest.digest
    elif config.calibrates and config.calibration is not None:
        text = identify(config.calibration.sources, f"{KEY}.sources")
        read = [text, digest_of_tokenizer(base.directory)]
        frame = frame_of(load_tokenizer(base.directory)).settings
        parents["calibration"] = digest_of([*read, frame] if frame else read)
    return parents


def _require_layers(base: BaseModel, layers: tuple[int, int]) -> None:
    """Raise an error if the layers to prune are not of one kind."""
    for layer in range(*layers):
        modules = base.family.modules(layer, base.geometry)
        _require_experts(layer, modules, base.checkpoint)


def _require_experts(
    layer: int, modules: list[tuple[str, CoupledLinear, int | None]], checkpoint: Checkpoint
) -> None:
    """Raise an error for a layer of a mixture-of-experts family with attention but no experts."""
    stored = {
        linear.per_expert
        for module, linear, _ in modules
        if f"{module}.weight" in checkpoint.location
    }
    if stored == {False} and any(linear.per_expert for _, linear, _ in modules):
        raise LoramError(
            f"prune.layers must be mixture-of-experts layers, but layer {layer} of "
            f"{checkpoint.directory} has no experts; remove it from prune.layers"
        )


def _require_pattern(
    base: BaseModel, pattern: Pattern, ratios: dict[int, float]
) -> dict[int, float]:
    """Return each pruned layer's ratio; raise an error if the pattern does not fit every linear."""
    specs = base.checkpoint.specs
    for layer in ratios:
        for entry in layer_linears(base.family, base.geometry, layer):
            pattern.require(specs[f"{entry.module}.weight"].shape[1], entry.module)
    return {layer: pattern.ratio(ratio) for layer, ratio in ratios.items()}


@dataclass(frozen=True)
class _Pruning:
    """The stage's work."""

    config: PruneConfig
    base: BaseModel
    layers: tuple[int, int]
    ratios: dict[int, float]
    ray_config: RayConfig

    def write(self, target: StageDirectory) -> None:
        """Write the pruned model, its plan and its scores."""
        scores: dict[int, LayerScores] = {}
        norms: dict[str, torch.Tensor] = {}
        if self.config.scores is not None:
            scores, norms = load_scores(self.config.scores, self.config.scored_by, self.layers)
        if self.config.pattern == STRUCTURED:
            scores = scores or structured_scores(
                self.config, self.base, self.layers, target.work, self.ray_config
            )
            plan = self._structured_plan(scores)
        else:
            errors, norms = sparsify_weights(
                self.config,
                self.base,
                self.layers,
                self.ratios,
                norms or None,
                target.work,
                self.ray_config,
            )
            plan = self._masked_plan(target)
            if errors:
                target.details["relative_errors"] = errors
        if self.config.criterion.reusable and (norms or scores):
            digest = save_scores(target.path, self.config.scored_by, scores, norms)
            target.hashes[SCORES_FILE] = digest
        self._write_model(target, plan)

    def _structured_plan(self, scores: dict[int, LayerScores]) -> PruningPlan:
        config, geometry = self.config, self.base.geometry
        kept = keep_units(scores, geometry, self.ratios, config.allocation, config.round_neurons_to)
        return PruningPlan(
            self.base.family.model_type,
            geometry,
            config.method,
            config.ratio,
            config.seed,
            self.layers,
            self.base.fingerprint,
            kept,
        )

    def _masked_plan(self, target: StageDirectory) -> PruningPlan:
        """Collect the layers' masks in one file, and create the plan from them."""
        specs = self.base.checkpoint.specs
        shapes, layer_of = {}, {}
        for layer in self.ratios:
            for entry in layer_linears(self.base.family, self.base.geometry, layer):
                rows, columns = specs[f"{entry.module}.weight"].shape
                shapes[entry.module] = rows, columns
                layer_of[entry.module] = layer
        packed = {module: packed_spec(shape) for module, shape in shapes.items()}
        require_space(target.path, sum(spec.nbytes for spec in packed.values()))
        path = target.path / MASKS_FILE
        writer = TensorWriter(path, packed)
        for module, layer in layer_of.items():
            writer.write(module, _read_sparsified(target, layer, f"{module}.mask"))
        target.hashes[MASKS_FILE] = writer.finish()
        return PruningPlan(
            self.base.family.model_type,
            self.base.geometry,
            self.config.method,
            Pattern.parse(self.config.pattern).ratio(self.config.ratio),
            self.config.seed,
            self.layers,
            self.base.fingerprint,
            layers={},
            pattern=self.config.pattern,
            masks=Masks(path, shapes, target.hashes[MASKS_FILE]),
        )

    def _write_model(self, target: StageDirectory, plan: PruningPlan) -> None:
        checkpoint = self.base.checkpoint
        base_specs = checkpoint.specs
        specs = {name: _pruned_spec(plan, name, spec) for name, spec in base_specs.items()}
        nbytes = sum(spec.nbytes for spec in specs.values())
        require_space(target.path, nbytes)
        config = pruned_config(self.base.config, plan, plan.linear_shapes(base_specs))
        write_model_files(checkpoint.directory, target.path, config, plan)
        masked = plan.masks.shapes if plan.masks else {}
        with (
            Reporter("prune", total=checkpoint.nbytes, unit="B") as reporter,
            CheckpointWriter(target.path, specs, self.config.max_shard_bytes) as writer,
        ):
            for name, spec in base_specs.items():
                module = name.removesuffix(".weight")
                if module != name and module in masked:
                    found = self.base.family.locate(module)
                    assert found is not None
                    tensor = _read_sparsified(target, found[0], name)
                else:
                    tensor = plan.select(name, checkpoint.read(name))
                writer.write(name, tensor)
                reporter.advance(spec.nbytes)
        target.hashes.update(writer.hashes)
        target.details.update(
            base_parameters=sum(_numel(spec) for spec in base_specs.values()),
            parameters=sum(_numel(spec) for spec in specs.values()),
            base_bytes=checkpoint.nbytes,
            bytes=nbytes,
            plan=plan.digest,
        )
        if plan.masks is not None:
            target.details["nonzero_parameters"] = target.details["parameters"] - sum(
                int((~plan.masks.read(module)).sum()) for module in masked
            )


def _read_sparsified(target: StageDirectory, layer: int, name: str) -> torch.Tensor:
    with safe_open(sparsified_file(target.work, layer), "pt") as file:
        return file.get_tensor(name)


def _pruned_spec(plan: PruningPlan, name: str, spec: TensorSpec) -> TensorSpec:
    return TensorSpec(plan.pruned_shape(name.rpartition(".")[0], spec.shape), spec.dtype)


def _numel(spec: TensorSpec) -> int:
    return spec.nbytes // spec.dtype.itemsize
