"""The train stage: trains an adapter on a model with examples.

Transformers and PEFT take seconds to import, so only the actor imports them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from loram_ray.artifacts.adapter import TEMPLATE_FILE
from loram_ray.artifacts.manifest import digest_of, read_manifest
from loram_ray.artifacts.stage_directory import StageDirectory, StageResult, run_stage
from loram_ray.config import RayConfig, TextSource, TrainConfig
from loram_ray.corpus.conversations import forms_of
from loram_ray.corpus.files import EXAMPLES, list_files
from loram_ray.corpus.rows import identify_rows
from loram_ray.finetuning.summary import TrainingSummary
from loram_ray.models.base import BaseModel
from loram_ray.models.tokenizer import frame_of, load_tokenizer, read_template
from loram_ray.plan import PruningPlan
from loram_ray.runtime.actors import run_in_actor
from loram_ray.runtime.cluster import (
    advise_precision,
    gpus_per_worker,
    ray_session,
    require_resources,
)
from loram_ray.runtime.progress import METRICS_FILE, Reporter, follow

Training = Callable[[TrainConfig, Path, Path], TrainingSummary]
"""Trains with a configuration of absolute paths, a work directory and an output directory."""


def train(config: TrainConfig, ray_config: RayConfig | None = None) -> StageResult:
    """Train a LoRA on a frozen model (LoRAM, step 3), in a Ray actor, on a GPU if there is one.

    The output is a standard PEFT directory with the model's shapes. If the model is pruned, it also
    contains the pruning plan. Training resumes from its last checkpoint.

    Raises:
        LoramError: There is no model or no usable example, the cluster or the GPU is too small, or
            a loss is not finite.
    """
    cpus = config.cpus or os.cpu_count() or 1

    def in_an_actor(settings: TrainConfig, work: Path, output: Path) -> TrainingSummary:
        with (
            ray_session(ray_config or RayConfig(), cpus),
            Reporter("train", config.steps, "step") as reporter,
        ):
            require_resources(1, cpus, gpus_per_worker(config.gpus), "train.cpus")
            advise_precision(settings.precision, "train")
            summary: TrainingSummary = run_in_actor(
                train_where_it_fits,
                (settings, work, output),
                cpus,
                config.max_failures,
                wait=lambda finished: follow(reporter, work / METRICS_FILE, finished),
                gpus=config.gpus,
            )
            return summary

    return train_by(config, in_an_actor)


def train_by(
    config: TrainConfig, training: Training, identity: tuple[str, str] | None = None
) -> StageResult:
    """Run the train stage with a given training function.

    Args:
        config: Configuration of the stage.
        training: Training function, called unless the output is complete.
        identity: Digest of the model and fingerprint of its base, if they are known.

    Raises:
        LoramError: As for `train`.
    """
    model_digest, base_fingerprint = identity or BaseModel(config.model, "train.model").identify()
    parents = {"model": model_digest, "data": digest_of_rows(config.data, "train.data")}
    if config.eval_data is not None:
        parents["eval_data"] = digest_of_rows(config.eval_data, "train.eval_data")
    if config.chat_template is not None:
        template = read_template(config.chat_template, "train.chat_template")
        parents["chat_template"] = digest_of(template)
    return run_stage(
        config.output,
        "train",
        settings={**_settings(config), **settings_of_rows(config, parents)},
        parents=parents,
        base_fingerprint=base_fingerprint,
        write=lambda target: _write(target, config, training),
        reads=(config.model, config.data, config.eval_data),
    )


def _settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that determine the adapter, besides the inputs."""
    settings = config.identity()
    if config.evaluates:  # they affect which checkpoint is kept
        settings |= {"eval_every": config.evaluate_every, "patience": config.patience}
    return settings


def digest_of_rows(data: str, key: str) -> str:
    """Return the digest of the files that hold rows.

    Args:
        data: File, directory or glob, as in the configuration.
        key: Configuration key of the data, for messages.
    """
    return digest_of([identify_rows(file) for file in list_files(data, key, EXAMPLES)])


@functools.lru_cache(maxsize=64)
def _forms_of(data: str, key: str, digest: str) -> frozenset[str]:
    """Return `forms_of` rows, cached by digest, as many trainings may share them."""
    return forms_of(data, key)


def settings_of_rows(config: TrainConfig, digests: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings of an identity that describe how rows are read; empty for standard rows.

    Args:
        config: Configuration of the training.
        digests: Digests of the rows under ``data`` and ``eval_data``.
    """
    forms = _forms_of(config.data, "train.data", digests["data"])
    if config.eval_data is not None:
        forms |= _forms_of(config.eval_data, "train.eval_data", digests["eval_data"])
    frame = frame_of(load_tokenizer(config.model)).settings if "text" in forms else {}
    named = (forms - {"text"}) if config.max_bad_share else (forms & {"columns"})
    return {**frame, **({"rows": sorted(named)} if named else {})}


def absolute(config: TrainConfig) -> TrainConfig:
    """Return the configuration with absolute paths, for a process elsewhere."""
    return config.model_copy(
        update={
            "model": config.model.resolve(),
            "data": TextSource(path=config.data).resolved().path,
            "eval_data": config.eval_data and TextSource(path=config.eval_data).resolved().path,
            "chat_template": config.chat_template and config.chat_template.resolve(),
        }
    )


def _write(target: StageDirectory, config: TrainConfig, training: Training) -> None:
    summary = training(absolute(config), target.work.resolve(), target.path.resolve())
    plan = PruningPlan.load_if_any(config.model)
    if plan is not None:
        plan.save(target.path)
    if config.chat_template is not None:
        template = read_template(config.chat_template, "train.chat_template")
        (target.path / TEMPLATE_FILE).write_text(template, "utf-8")
    (target.path / METRICS_FILE).write_bytes((target.work / METRICS_FILE).read_bytes())
    source = read_manifest(config.model)
    target.details.update(asdict(summary), model_stage=source.stage if source else "base")


def train_where_it_fits(config: TrainConfig, work: Path, output: Path) -> TrainingSummary:
    """Train in the actor, after checking that the GPU has enough memory."""
    from loram_ray.finetuning.trainer import train_adapter

    require_room(config)
    return train_adapter(config, work, output)


def require_room(config: TrainConfig, adapters: int = 1) -> None:
    """Raise an error if a training needs more memory than its share of this process's GPU.

    Args:
        config: Configuration of the stage.
        adapters: Number of such trainings at a time on one copy of the model.

    Raises:
        LoramError: The memory does not suffice; the message says what would fit.
    """
    if torch.cuda.is_available():
        from loram_ray.estimating.gpu_check import require_memory

        free, whole = torch.cuda.mem_get_info()
        if (
            config.gpus < 1
        ):  # a training that exceeds its share fails alone, without affecting others
            torch.cuda.set_per_process_memory_fraction(config.gpus)
        require_memory(config, min(free, int(config.gpus * whole)), adapters)
