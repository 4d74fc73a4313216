"""LoRAM: train a LoRA on a pruned model, recover it, use it on the base.

``import loram_ray`` lets ``AutoModelForCausalLM.from_pretrained`` load pruned models. The names
below are imported when they are first used, so that the mathematics brings in no Ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loram_ray.commands import COMMANDS, imported
from loram_ray.errors import LoramError as LoramError
from loram_ray.models.registration import register_on_first_use

if TYPE_CHECKING:
    # isort: off
    from loram_ray.config import (
        AlignConfig as AlignConfig,
        BatchConfig as BatchConfig,
        CalibrationConfig as CalibrationConfig,
        CompareConfig as CompareConfig,
        EvaluateConfig as EvaluateConfig,
        ExportConfig as ExportConfig,
        MergeConfig as MergeConfig,
        PruneConfig as PruneConfig,
        PublishConfig as PublishConfig,
        QuantizeConfig as QuantizeConfig,
        RayConfig as RayConfig,
        RecoverConfig as RecoverConfig,
        RunConfig as RunConfig,
        SweepConfig as SweepConfig,
        TrainConfig as TrainConfig,
        load_run as load_run,
    )
    from loram_ray.models.loading import load_pruned as load_pruned
    from loram_ray.plan import PruningPlan as PruningPlan
    from loram_ray.reporting.write import report as report
    from loram_ray.stages.align import align as align
    from loram_ray.stages.evaluate import evaluate as evaluate
    from loram_ray.stages.export import export as export
    from loram_ray.stages.merge import merge as merge
    from loram_ray.stages.prune import prune as prune
    from loram_ray.stages.publish import publish as publish
    from loram_ray.stages.quantize import quantize as quantize
    from loram_ray.stages.recover import recover as recover
    from loram_ray.stages.run import run as run
    from loram_ray.stages.train import train as train
    from loram_ray.studies.batch import batch as batch
    from loram_ray.studies.compare import compare as compare
    from loram_ray.studies.sweep import sweep as sweep
    # isort: on

_PATH_OF = {
    "CalibrationConfig": "config.prune.CalibrationConfig",
    "PruningPlan": "plan.PruningPlan",
    "RayConfig": "config.base.RayConfig",
    "load_pruned": "models.loading.load_pruned",
    "load_run": "config.load.load_run",
    "report": "reporting.write.report",
    **{command.name: command.function for command in COMMANDS},
    **{command.section_name: command.section for command in COMMANDS},
}

__all__ = ["LoramError", *_PATH_OF]  # noqa: PLE0604

register_on_first_use()


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _PATH_OF:
        raise AttributeError(f"module 'loram_ray' has no attribute '{name}'")
    return imported(_PATH_OF[name])
