"""The align stage: corpus and pruned model in, aligned model out."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from loram_ray.alignment.batches import Inputs
from loram_ray.alignment.deepspeed import deepspeed_config, read_users
from loram_ray.alignment.loop import OUTCOME_FILE, LoopSettings, train_loop
from loram_ray.alignment.targets import prepare_targets
from loram_ray.cluster import gpus_per_worker, ray_session, require_resources
from loram_ray.config import AlignConfig, RayConfig
from loram_ray.corpus.pack import end_of_text
from loram_ray.corpus.prepare import prepare_corpus, require_text
from loram_ray.corpus.sources import list_sources
from loram_ray.errors import LoramError
from loram_ray.manifest import fingerprint, read_manifest, read_model_config, require_stage
from loram_ray.model_card import CARD_FILE, SIZES, model_card
from loram_ray.modeling import load_tokenizer, resolve_base, write_model_files
from loram_ray.plan import PruningPlan
from loram_ray.progress import METRICS_FILE, Reporter, follow
from loram_ray.stage import StageDirectory, StageResult, run_stage
from loram_ray.tensorfile import Checkpoint
from loram_ray.tracking import require_trackers, tracking

# Of what is left out here, some changes float rounding: an interrupted run goes on with it changed.
_NOT_IN_IDENTITY = {
    "pruned",
    "output",
    "base",
    "corpus",
    "distillation",
    "steps",
    "tokens",
    "micro_batch_size",
    "workers",
    "min_workers",
    "cpus_per_worker",
    "activation_checkpointing",
    "offload_optimiser",
    "offload_parameters",
    "offload_folder",
    "deepspeed",
    "evaluate_every",
    "evaluate_sequences",
    "trackers",
    "peak_tflops",
    "checkpoint_every",
    "max_failures",
}
_NOT_LEARNT_FROM = {"workers", "gpus_per_worker", "batch_size", "stream_rows"}


def align(config: AlignConfig, ray_config: RayConfig | None = None) -> StageResult:
    """Align a pruned model by continual pre-training, on the corpus or on its base (LoRAM, step 2).

    The corpus is tokenised and packed once beside the output, and, for distillation, the base's
    likeliest tokens are computed over it. Training continues from the last checkpoint when the
    stage is started again, or when workers die.

    Raises:
        LoramError: not a pruned model, another base, no text, a cluster too small, a loss that is
            not finite.
    """
    manifest = require_stage(config.pruned, ("prune", "align"), "align.pruned")
    config = config.model_copy(
        update={"pruned": config.pruned.resolve(), "output": config.output.resolve()}
    )
    _require_sequence_fits(config)
    users = read_users(config.deepspeed)
    deepspeed_config(config, users, config.workers)  # says at once what does not fit
    require_trackers(config.trackers, "align.trackers")
    base = _base_of(config) if config.objective == "distillation" else None
    require_text(config.corpus)
    with ray_session(ray_config or RayConfig(), cpus=config.actors * config.cpus_per_worker):
        require_resources(
            config.min_workers or config.workers,
            config.cpus_per_worker,
            gpus_per_worker(),
            "align.workers",
        )
        name = config.output.name
        beside = config.output.with_name
        corpus = prepare_corpus(config.corpus, config.pruned, beside(f"{name}_corpus"))
        parents = {"pruned": manifest.digest, "corpus": corpus.manifest.digest}
        closing = None
        if config.isolate_documents:
            closing = end_of_text(load_tokenizer(config.pruned))
        targets = None
        if base is not None and config.distillation.targets == "cached":
            output = beside(f"{name}_targets")
            targets = prepare_targets(
                config, base, manifest.base_fingerprint, corpus, closing, output
            )
            parents["targets"] = targets.manifest.digest
        inputs = Inputs(
            corpus=corpus.output,
            targets=targets.output if targets is not None else None,
            teacher=base if targets is None else None,
            closing=closing,
        )
        return run_stage(
            config.output,
            "align",
            settings=_settings(config, users),
            parents=parents,
            base_fingerprint=manifest.base_fingerprint,
            write=lambda target: _write(target, config, users, inputs, corpus.manifest.details),
        )


def _settings(config: AlignConfig, users: dict[str, Any]) -> dict[str, Any]:
    """What determines the result besides the inputs."""
    settings = config.model_dump(mode="json", exclude=_NOT_IN_IDENTITY)
    settings |= {"steps": config.total_steps, "deepspeed": users}
    if config.objective == "distillation":
        settings["distillation"] = config.distillation.model_dump(
            mode="json", exclude=_NOT_LEARNT_FROM
        )
    return settings


def _base_of(config: AlignConfig) -> Path:
    """Return the base's directory, after refusing one that is not the pruned model's."""
    assert config.base is not None
    base = resolve_base(config.base, "align.base").resolve()
    plan = PruningPlan.load(config.pruned)
    with Checkpoint(base) as checkpoint:
        plan.require_base(fingerprint(checkpoint), f"align.base {config.base}")
    limits = read_model_config(base)
    top_k, words = config.distillation.top_k, limits["vocab_size"]
    if top_k > words:
        raise LoramError(
            f"align.distillation.top_k must be at most {words} (the vocabulary), got {top_k}; "
            "lower it"
        )
    layers = limits["num_hidden_layers"]
    for layer in config.distillation.hidden_layers:
        if not 0 <= layer < layers:
            raise LoramError(
                f"align.distillation.hidden_layers must be from 0 to {layers - 1}, got {layer}; "
                "change it"
            )
    return base


def _require_sequence_fits(config: AlignConfig) -> None:
    limit = read_model_config(config.pruned).get("max_position_embeddings")
    if limit is not None and config.corpus.sequence_length > limit:
        raise LoramError(
            f"align.corpus.sequence_length must be at most {limit} (the model's positions), got "
            f"{config.corpus.sequence_length}; lower it"
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
    _fit(config, loop)
    outcome = json.loads((target.work / OUTCOME_FILE).read_text())
    target.hashes.update(outcome["hashes"])
    write_model_files(config.pruned, target.path, read_model_config(config.pruned), plan)
    (target.path / METRICS_FILE).write_bytes((target.work / METRICS_FILE).read_bytes())
    lines = (target.path / METRICS_FILE).read_text().splitlines()
    pruned, last = read_manifest(config.pruned), json.loads(lines[-1])
    assert pruned is not None
    sources = list_sources(inputs.corpus)
    card = model_card(config, plan, pruned, sources, last, outcome["steps"])
    (target.path / CARD_FILE).write_text(card)
    target.details.update(
        {key: pruned.details[key] for key in SIZES},
        steps=outcome["steps"],
        tokens=outcome["steps"] * config.batch_size * config.corpus.sequence_length,
        seconds=outcome["seconds"],
        corpus=corpus,
    )


def _fit(config: AlignConfig, loop: LoopSettings) -> None:
    """Run Ray Train until the last step, showing the workers' metrics meanwhile."""
    import ray.train
    from ray.train.torch import TorchTrainer

    gpus = gpus_per_worker()
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"loop": loop},
        scaling_config=ray.train.ScalingConfig(
            num_workers=(config.min_workers, config.workers)
            if config.min_workers
            else config.workers,
            use_gpu=bool(gpus),
            resources_per_worker={"CPU": config.cpus_per_worker, **({"GPU": gpus} if gpus else {})},
        ),
        run_config=ray.train.RunConfig(
            name="checkpoints",
            storage_path=str(loop.work),
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            worker_runtime_env={
                "env_vars": {
                    "OMP_NUM_THREADS": str(config.cpus_per_worker),
                    "TOKENIZERS_PARALLELISM": "false",
                }
            },
        ),
    )
    ended = threading.Event()
    settings = config.model_dump(mode="json")
    with (
        Reporter("align", total=config.total_steps, unit="step") as reporter,
        tracking(config.trackers, "align", config.output, loop.work, settings) as tracked,
    ):
        watcher = threading.Thread(
            target=follow, args=(reporter, loop.work / METRICS_FILE, ended.wait, tracked)
        )
        watcher.start()
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise _translated(error) from error
        finally:
            ended.set()
            watcher.join()


def _translated(error: Exception) -> Exception:
    """Return the workers' own message for what the user can mend, else the error as it is."""
    failures: dict[int, Any] = getattr(error, "worker_failures", {})
    for failure in failures.values():
        cause = getattr(failure, "cause", None) or getattr(failure, "_base_exc", None) or failure
        if isinstance(cause, LoramError):
            return LoramError(str(cause))
    return error
