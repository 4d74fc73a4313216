"""The evaluate stage: a model, perhaps with an adapter, against held-out data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from loram_ray.adapter import CONFIG_FILE
from loram_ray.changes import is_delta
from loram_ray.cluster import gpus_per_worker, ray_session, require_resources, run_in_actor
from loram_ray.config import EvaluateConfig, RayConfig, TextSource
from loram_ray.corpus.files import EXAMPLES, hash_content, list_files
from loram_ray.corpus.read import identify
from loram_ray.errors import LoramError
from loram_ray.evaluation.scoring import score
from loram_ray.manifest import (
    digest_of,
    hash_file,
    identify_model,
    read_manifest,
    require_stage,
    write_json,
)
from loram_ray.modeling import read_template, resolve_base
from loram_ray.plan import PLAN_FILE, PruningPlan
from loram_ray.progress import METRICS_FILE, Reporter, follow
from loram_ray.stage import StageDirectory, StageResult, run_stage

SCORES_FILE = "scores.json"
_NOT_IN_IDENTITY = {
    "model",
    "adapter",
    "output",
    "data",
    "chat_template",
    "text",
    "cpus",
    "gpus",
    "max_failures",
}


def evaluate(config: EvaluateConfig, ray_config: RayConfig | None = None) -> StageResult:
    """Score a base, pruned, aligned or merged model, with or without an adapter.

    Writes ``scores.json``: ``answer_perplexity`` and ``exact_match`` where there is ``data``,
    ``text_perplexity`` where there is ``text``.

    Raises:
        LoramError: an adapter that is not for the model, or no usable data.
    """
    model = resolve_base(config.model, "evaluate.model")
    model_digest, base_fingerprint = identify_model(model, "evaluate.model")
    parents = {"model": model_digest, "data": _data_digest(config)}
    if config.adapter is not None:
        parents["adapter"] = _adapter_digest(config.adapter, model, model_digest, base_fingerprint)
    if config.chat_template is not None:
        template = read_template(config.chat_template, "evaluate.chat_template")
        parents["chat_template"] = digest_of(template)
    return run_stage(
        config.output,
        "evaluate",
        settings=config.model_dump(mode="json", exclude=_NOT_IN_IDENTITY),
        parents=parents,
        base_fingerprint=base_fingerprint,
        write=lambda target: _write(target, config, model, ray_config or RayConfig()),
    )


def _data_digest(config: EvaluateConfig) -> str:
    parts: list[Any] = []
    if config.data is not None:
        files = list_files(config.data, "evaluate.data", EXAMPLES)
        parts += [hash_content(file.path) for file in files]
    if config.text is not None:
        parts += [
            identify(config.text.sources, "evaluate.text.sources"),
            config.text.sequence_length,
        ]
    return digest_of(parts)


def _adapter_digest(adapter: Path, model: Path, model_digest: str, base: str) -> str:
    """Digest of an adapter, after refusing one that was made for another model."""
    if is_delta(adapter):
        raise LoramError(
            f"evaluate.adapter must be a PEFT adapter directory, {adapter} holds a dense delta; "
            "run loram merge and evaluate the merged model"
        )
    if not (adapter / CONFIG_FILE).exists():
        raise LoramError(
            f"evaluate.adapter must be a PEFT adapter directory, {adapter} holds no {CONFIG_FILE}; "
            "run loram train or loram recover first"
        )
    if read_manifest(adapter) is None:
        return digest_of([hash_file(path) for path in sorted(adapter.glob("adapter_*"))])
    manifest = require_stage(adapter, ("train", "recover"), "evaluate.adapter")
    if manifest.base_fingerprint != base:
        raise LoramError(
            f"evaluate.adapter {adapter} was made for base {manifest.base_fingerprint[:12]}, "
            f"{model} is of {base[:12]}; use the adapter's own base"
        )
    pruned_model, pruned_adapter = (model / PLAN_FILE).exists(), (adapter / PLAN_FILE).exists()
    if pruned_model != pruned_adapter:
        remedy = "run loram recover first" if pruned_adapter else "evaluate it on its base"
        raise LoramError(f"evaluate.adapter {adapter} is not for {model}; {remedy}")
    if pruned_adapter and PruningPlan.load(model).digest != PruningPlan.load(adapter).digest:
        raise LoramError(
            f"evaluate.adapter {adapter} was trained under another plan than {model}'s; "
            "use the pruned model it was trained on"
        )
    return manifest.digest


def _write(
    target: StageDirectory, config: EvaluateConfig, model: Path, ray_config: RayConfig
) -> None:
    cpus = config.cpus or os.cpu_count() or 1
    absolute = config.model_copy(
        update={
            "model": str(model.resolve()),
            "adapter": config.adapter.resolve() if config.adapter else None,
            "data": TextSource(path=config.data).resolved().path if config.data else None,
            "chat_template": config.chat_template and config.chat_template.resolve(),
            "text": config.text.resolved() if config.text else None,
        }
    )
    with ray_session(ray_config, cpus), Reporter("evaluate", 0, "row") as reporter:
        require_resources(1, cpus, gpus_per_worker(config.gpus), "evaluate.cpus")
        scores = run_in_actor(
            score,
            (absolute, target.work.resolve()),
            cpus,
            config.max_failures,
            wait=lambda finished: follow(reporter, target.work / METRICS_FILE, finished),
            gpus=config.gpus,
        )
    write_json(target.path / SCORES_FILE, scores)
    target.details.update(scores)
