"""The align stage: makes an aligned model from a corpus and a pruned model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loram_ray.alignment.batches import Inputs
from loram_ray.alignment.deepspeed_config import deepspeed_config, read_user_config
from loram_ray.alignment.driver import fit
from loram_ray.alignment.loop import OUTCOME_FILE, ROWS_FILE, LoopSettings, Outcome
from loram_ray.alignment.targets import prepare_targets
from loram_ray.artifacts.manifest import (
    read_manifest,
    require_sizes,
    require_stage,
)
from loram_ray.artifacts.stage_directory import StageDirectory, StageResult, run_stage
from loram_ray.config import AlignConfig, RayConfig
from loram_ray.corpus.order import WINDOW
from loram_ray.corpus.prepare import prepare_corpus, require_text
from loram_ray.corpus.sources import list_sources
from loram_ray.errors import LoramError
from loram_ray.models.base import BaseModel
from loram_ray.models.files import write_model_files
from loram_ray.models.tokenizer import frame_of, load_tokenizer
from loram_ray.plan import PruningPlan
from loram_ray.runtime.cluster import (
    advise_precision,
    gpus_per_worker,
    ray_session,
    require_resources,
    require_shared,
)
from loram_ray.runtime.progress import METRICS_FILE, read_metrics
from loram_ray.runtime.tracking import require_trackers
from loram_ray.stages.model_card import CARD_FILE, SIZES, model_card
from loram_ray.utils.parsing.documents import read_as


def align(config: AlignConfig, ray_config: RayConfig | None = None) -> StageResult:
    """Align a pruned model by continual pre-training, on the corpus or on its base (LoRAM, step 2).

    The corpus is tokenised and packed once, beside the output. For distillation, the base's
    likeliest tokens are computed over it. Training resumes from the last checkpoint when the stage
    is started again, or when workers die.

    Raises:
        LoramError: The model is not pruned or has another base, there is no text, the cluster is
            too small, or a loss is not finite.
    """
    manifest = require_stage(config.pruned, ("prune", "align"), "align.pruned")
    require_sizes(config.pruned, manifest, SIZES)
    config = _resolved(config)
    _require_sequence_fits(config)
    users = read_user_config(config.deepspeed)
    deepspeed_config(config, users, config.workers)  # raises errors before work begins
    require_trackers(config.trackers, "align.trackers")
    base = _base_of(config) if config.distils else None
    require_text(config.corpus)
    with ray_session(ray_config or RayConfig(), cpus=config.max_workers * config.cpus_per_worker):
        _require_cluster(config)
        inputs, prepared = _prepare(config, base, manifest.base_fingerprint)
        corpus = prepared["corpus"].manifest.details
        parents = {name: stage.manifest.digest for name, stage in prepared.items()}
        return run_stage(
            config.output,
            "align",
            settings=_settings(config, users),
            parents={"pruned": manifest.digest, **parents},
            base_fingerprint=manifest.base_fingerprint,
            write=lambda target: _write(target, config, users, inputs, corpus),
            reads=(config.base, config.pruned, *(s.path for s in config.corpus.sources)),
        )


def _resolved(config: AlignConfig) -> AlignConfig:
    """Return the configuration with absolute paths, which all workers share."""
    return config.model_copy(
        update={
            "pruned": config.pruned.resolve(),
            "output": config.output.resolve(),
            "cache_dir": config.cache_dir and config.cache_dir.resolve(),
        }
    )


def _require_cluster(config: AlignConfig) -> None:
    """Raise an error if the cluster is too small, or does not share the directories."""
    require_shared(config.output.parent, "align.output")
    if config.cache_dir is not None:
        require_shared(config.cache_dir, "align.cache_dir")
    require_resources(
        config.min_workers or config.workers,
        config.cpus_per_worker,
        gpus_per_worker(),
        "align.workers",
    )
    advise_precision(config.precision, "align")


def _prepare(
    config: AlignConfig, base: Path | None, fingerprint: str
) -> tuple[Inputs, dict[str, StageResult]]:
    """Prepare the corpus and, if they are cached, the targets; return them with their results."""
    corpus = prepare_corpus(config.corpus, config.pruned, _prepared(config, "corpus"))
    results = {"corpus": corpus}
    frame = frame_of(load_tokenizer(config.pruned))
    targets = None
    if base is not None and config.distillation.targets == "cached":
        isolating = frame if config.isolate_documents else None
        output = _prepared(config, "targets")
        targets = prepare_targets(config, base, fingerprint, corpus, isolating, output)
        results["targets"] = targets
    inputs = Inputs(
        corpus=corpus.output,
        targets=targets.output if targets is not None else None,
        teacher=base if targets is None else None,
        frame=frame,
        isolated=config.isolate_documents,
    )
    return inputs, results


def _prepared(config: AlignConfig, what: str) -> Path:
    """Return the directory of the packed corpus or of the targets."""
    if config.cache_dir is not None:
        return config.cache_dir / what
    return config.output.with_name(f"{config.output.name}_{what}")


def _settings(config: AlignConfig, users: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that determine the result, besides the inputs."""
    settings = config.identity()
    settings |= {"steps": config.total_steps, "deepspeed": users, "order_window": WINDOW}
    if config.distils:
        settings["distillation"] = config.distillation.identity()
    return settings


def _base_of(config: AlignConfig) -> Path:
    """Return the base's directory; raise an error if it is not the pruned model's base."""
    assert config.base is not None
    plan = PruningPlan.load(config.pruned)
    with BaseModel.open(config.base, "align.base") as base:
        plan.require_base(base.fingerprint, f"align.base {config.base}")
    top_k, words = config.distillation.top_k, base.config["vocab_size"]
    if top_k > words:
        raise LoramError(
            f"align.distillation.top_k must be at most the vocabulary's size, {words}, got "
            f"{top_k}; lower it"
        )
    layers = base.config["num_hidden_layers"]
    for layer in config.distillation.hidden_layers:
        if not 0 <= layer < layers:
            raise LoramError(
                f"align.distillation.hidden_layers must be from 0 to {layers - 1}, got {layer}; "
                "change it"
            )
    return base.directory.resolve()


def _require_sequence_fits(config: AlignConfig) -> None:
    limit = BaseModel(config.pruned, "align.pruned").positions
    if limit is not None and config.corpus.sequence_length > limit:
        raise LoramError(
            f"align.corpus.sequence_length must be at most {limit} (the model's context length), "
            f"got {config.corpus.sequence_length}; lower it"
        )


def _write(
    target: StageDirectory,
    config: AlignConfig,
    users: dict[str, Any],
    inputs: Inputs,
    corpus: dict[str, Any],
) -> None:
    plan = PruningPlan.load(config.pruned)
    loop = LoopSettings(config, users, inputs, target.work, target.path)
    fit(loop)
    outcome = read_as(target.work / OUTCOME_FILE, Outcome)
    target.hashes.update(outcome.hashes)
    model = BaseModel(config.pruned, "align.pruned")
    write_model_files(model.directory, target.path, model.config, plan)
    for name in (METRICS_FILE, *((ROWS_FILE,) if config.log_rows else ())):
        (target.path / name).write_bytes((target.work / name).read_bytes())
    lines, pruned = read_metrics(target.path / METRICS_FILE), read_manifest(config.pruned)
    assert pruned is not None
    sources = list_sources(inputs.corpus)
    card = model_card(config, plan, pruned, sources, lines[0], lines[-1], outcome.steps)
    (target.path / CARD_FILE).write_text(card, "utf-8")
    target.details.update(
        {key: pruned.details[key] for key in SIZES},
        steps=outcome.steps,
        tokens=outcome.steps * config.batch_size * config.corpus.sequence_length,
        seconds=outcome.seconds,
        corpus=corpus,
    )
