"""Run a sweep: trials under Ray Tune, recovery of the best one, and a table of all trials."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from loram_ray.artifacts.stage_directory import StageDirectory, StageResult, run_stage
from loram_ray.config import (
    AlignConfig,
    PruneConfig,
    RayConfig,
    SweepConfig,
    TrainConfig,
    accepts_a_run,
    validate,
)
from loram_ray.config.batch import OF_THE_WHOLE
from loram_ray.errors import LoramError
from loram_ray.finetuning.summary import TrainingSummary
from loram_ray.models.base import BaseModel
from loram_ray.runtime.actors import run_in_actor
from loram_ray.runtime.cluster import (
    advise_precision,
    gpus_per_worker,
    ray_session,
    require_resources,
)
from loram_ray.runtime.progress import METRICS_FILE, last_line, say
from loram_ray.runtime.results import write_results
from loram_ray.stages.align import align
from loram_ray.stages.prune import prune
from loram_ray.stages.recover import recover, recovery_in, require_recovery
from loram_ray.stages.run import cpus_for_models
from loram_ray.stages.train import absolute, digest_of_rows, settings_of_rows, train_by
from loram_ray.studies.trials import ADAPTER, SUMMARY_FILE, WORK, Trial, trials_of
from loram_ray.utils.names import folded, is_plain
from loram_ray.utils.parsing.documents import read_as

BEST_FILE = "best.yaml"
_OF_THE_TRIAL = {*OF_THE_WHOLE, "preset"}


@dataclass(frozen=True)
class _Model:
    """Model to try, with the stages that make it if needed: pruning and optional alignment."""

    directory: Path
    prune: PruneConfig | None = None
    align: AlignConfig | None = None


@accepts_a_run
def sweep(config: SweepConfig, ray_config: RayConfig | None = None) -> StageResult:
    """Try training settings, stop bad trials early, and keep the best adapter.

    Trials are compared by their loss on held-out examples: trials on the same model during training
    (ASHA), and the best trials of several models after recovery, on the base. The output contains
    the adapter, its settings in ``best.yaml``, and the results of all trials in ``results.json``
    and ``results.parquet``. A second call resumes an interrupted sweep.

    Raises:
        LoramError: If the ``sweep`` section is missing, training settings are invalid, the cluster
            cannot place a trial, or no trial succeeds.
    """
    ray = ray_config or RayConfig()
    models = _models_of(config)
    trials = trials_of(config, {name: model.directory for name, model in models.items()})
    cpus = config.workers * config.cpus_per_worker
    made = [section for m in models.values() for section in (m.prune, m.align) if section]
    with ray_session(ray, max(cpus, cpus_for_models(made))):
        for model in models.values():
            if model.prune is not None:
                prune(model.prune, ray)
            if model.align is not None:
                align(model.align, ray)
        identities = _identified(models)
        for model in models.values():
            require_recovery(model.directory, config.correction, "sweep.correction")
        parents = {f"model {name}".strip(): digest for name, (digest, _) in identities.items()}
        parents["data"] = digest_of_rows(config.data, "sweep.data")
        if (eval_data := trials[0].train.eval_data) is not None:
            parents["eval_data"] = digest_of_rows(eval_data, "sweep.train.eval_data")
        return run_stage(
            config.output,
            "sweep",
            settings={
                **config.identity(),
                **settings_of_rows(trials[0].train, parents),
            },
            parents=parents,
            base_fingerprint=next(fingerprint for _, fingerprint in identities.values()),
            write=lambda target: _write(target, config, trials, identities),
            reads=(*(model.directory for model in models.values()), config.data),
        )


def _models_of(config: SweepConfig) -> dict[str, _Model]:
    if not config.ratios:
        directories = config.models or (config.model,)
        names = [_name_of(directory) if config.models else "" for directory in directories]
        if len(set(map(folded, names))) < len(names):
            names = [f"{number}-{name}" for number, name in enumerate(names)]
        return {n: _Model(directory) for n, directory in zip(names, directories, strict=True)}
    if config.prune is None:
        raise LoramError("sweep.ratios needs the section prune; add 'prune:'")
    found = {}
    for ratio in config.ratios:
        name = f"ratio={ratio:g}"
        models_dir = config.models_dir or config.output.parent / "models"
        pruned = models_dir / name / "pruned"
        aligned = pruned.with_name("aligned")
        settings = {"base": config.base, **config.prune, "ratio": ratio, "output": pruned}
        settings.pop("ratios", None)
        pruning: PruneConfig = validate(PruneConfig, settings, "sweep.ratios")
        if config.align is None:
            found[name] = _Model(pruned, pruning)
            continue
        settings = {"base": config.base, **config.align, "pruned": pruned, "output": aligned}
        aligning: AlignConfig = validate(AlignConfig, settings, "sweep.ratios")
        found[name] = _Model(aligned, pruning, aligning)
    return found


def _name_of(directory: Path) -> str:
    """Return the name of a directory, also for ``.`` and ``..``."""
    return directory.name if is_plain(directory.name) else directory.resolve().name


def _identified(models: Mapping[str, _Model]) -> dict[str, tuple[str, str]]:
    """Return each model's digest and its base's fingerprint, which must be the same for all."""
    found = {}
    for name, model in models.items():
        found[name] = BaseModel(model.directory, "sweep.model").identify()
    bases = {fingerprint for _, fingerprint in found.values()}
    if len(bases) > 1:
        raise LoramError(
            f"sweep.models must have the same base, got {len(bases)} bases; run a sweep for each"
        )
    return found


def _write(
    target: StageDirectory,
    config: SweepConfig,
    trials: Sequence[Trial],
    identities: Mapping[str, tuple[str, str]],
) -> None:
    from loram_ray.studies.tuning import run_trials  # imports Ray, which must be configured first

    gpus = gpus_per_worker(config.gpus_per_worker)
    require_resources(
        min(config.workers, len(trials)), config.cpus_per_worker, gpus, "sweep.workers"
    )
    advise_precision(trials[0].train.precision, "sweep.train")
    folder = target.work.resolve() / "trials"
    reasons = run_trials(config, trials, folder, target.work.resolve() / "tune", gpus)
    rows = [_row(trial, folder / trial.name, reasons[trial.name]) for trial in trials]
    best = _best(rows, {trial.name: trial for trial in trials}, folder, config, identities)
    best["best"] = True
    for made in (_final(folder) / best["name"]).iterdir():
        made.rename(target.path / made.name)
    _write_settings(target.path, next(t for t in trials if t.name == best["name"]), config)
    (target.path / "trials").mkdir()
    for row in rows:
        inner = folder / row["name"]
        for found in (inner / METRICS_FILE, inner / WORK / METRICS_FILE):
            if found.exists():
                shutil.copyfile(found, target.path / "trials" / f"{row['name']}.jsonl")
                break
    write_results(target.path, rows, _columns(trials))
    states = [row["state"] for row in rows]
    target.details.update(
        best=best["name"],
        eval_loss=best["eval_loss"],
        base_loss=best["base_loss"],
        trials={state: states.count(state) for state in sorted(set(states))},
    )


def _best(
    rows: Sequence[dict[str, Any]],
    trials: Mapping[str, Trial],
    folder: Path,
    config: SweepConfig,
    identities: Mapping[str, tuple[str, str]],
) -> dict[str, Any]:
    """Return the row of the best trial, after finishing and judging the finalists' adapters."""
    whole = sorted(
        (row for row in rows if row["state"] == "done"), key=lambda row: row["eval_loss"]
    )
    if not whole:
        failed = next(row for row in rows if row["reason"])
        raise LoramError(f"sweep: no trial succeeded; {failed['name']}: {failed['reason']}")
    finalists = [
        row
        for model in identities
        for row in [row for row in whole if row["model"] == model][: config.finalists]
    ]
    judged = len(finalists) > 1
    for row in finalists:
        trial, final = trials[row["name"]], _final(folder) / row["name"]
        _finish(trial, folder / trial.name, final, config, identities[trial.model])
        if judged:
            say("sweep", f"{trial.name} on the base")
            row["base_loss"] = _judged(trial, final, config)
    return min(finalists, key=lambda row: row["base_loss"] if judged else row["eval_loss"])


def _final(folder: Path) -> Path:
    """Return the directory of the finalists' adapters."""
    return folder.with_name("finalists")


def _write_settings(output: Path, trial: Trial, config: SweepConfig) -> None:
    """Write the settings with which ``loram train`` reproduces the adapter."""
    settings = trial.train.model_dump(mode="json", exclude=_OF_THE_TRIAL, exclude_unset=True)
    # Include cpus: the number of threads changes the order of summation.
    whole = {"model": str(trial.train.model), "data": config.data, "cpus": config.cpus_per_worker}
    section = {**whole, **settings}
    (output / BEST_FILE).write_text(yaml.safe_dump({"train": section}))


def _row(trial: Trial, folder: Path, reason: str) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": trial.name,
        "state": "failed" if reason else "stopped",
        "reason": reason,
        "model": trial.model,
        "values": trial.values,
        "best": False,
        "steps": 0,
        "eval_loss": None,
        "base_loss": None,
        "trained_parameters": None,
    }
    if (folder / SUMMARY_FILE).exists():
        summary = asdict(_summary_in(folder))
        kept = ("steps", "eval_loss", "trained_parameters")
        return {**row, "state": "done", "reason": "", **{key: summary[key] for key in kept}}
    line = last_line(folder / WORK / METRICS_FILE, having="eval_loss")
    if line is not None:
        row |= {"steps": line["step"], "eval_loss": line["eval_loss"]}
    return row


def _summary_in(folder: Path) -> TrainingSummary:
    return read_as(folder / SUMMARY_FILE, TrainingSummary, constants=True)


def _columns(trials: Sequence[Trial]) -> dict[str, pa.DataType]:
    text, whole, real = pa.string(), pa.int64(), pa.float64()
    columns = {"name": text, "state": text, "reason": text, "model": text, "best": pa.bool_()}
    columns |= {"steps": whole, "eval_loss": real, "base_loss": real, "trained_parameters": whole}
    for key in trials[0].values:
        columns[f"values.{key}"] = pa.array([trial.values[key] for trial in trials]).type
    return columns


def _finish(
    trial: Trial, folder: Path, final: Path, config: SweepConfig, identity: tuple[str, str]
) -> None:
    """Turn a trial's adapter into the outputs of the stages train and recover."""

    def training(_: TrainConfig, work: Path, output: Path) -> TrainingSummary:
        shutil.copytree(folder / ADAPTER, output, dirs_exist_ok=True)
        shutil.copyfile(folder / METRICS_FILE, work / METRICS_FILE)
        return _summary_in(folder)

    trained, recovery = recovery_in(final, trial.train.model, config.base, config.correction)
    train_by(trial.train.model_copy(update={"output": trained}), training, identity)
    if recovery is not None:
        recover(recovery)


def _judged(trial: Trial, final: Path, config: SweepConfig) -> float:
    """Return the loss of a recovered adapter on the base, over the held-out examples."""
    assert config.base is not None
    base = BaseModel.open(config.base, "sweep.base").directory.resolve()
    work = final.resolve().parent
    arguments = (absolute(trial.train), base, (final / "adapter").resolve(), work / ".judging")
    loss: float = run_in_actor(
        _held_out_loss,
        arguments,
        config.cpus_per_worker,
        config.max_failures,
        _until,
        config.gpus_per_worker,
    )
    shutil.rmtree(work / ".judging")
    return loss


def _held_out_loss(config: TrainConfig, base: Path, adapter: Path, work: Path) -> float:
    """Compute the loss inside an actor, which alone imports the dependencies."""
    from loram_ray.finetuning.held_out import held_out_loss

    return held_out_loss(config, base, adapter, work)


def _until(finished: Any) -> None:
    while not finished(1.0):
        pass
