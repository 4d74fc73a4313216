"""LoRAM: train a LoRA on a pruned model, recover it, use it on the base.

``import loram_ray`` lets ``AutoModelForCausalLM.from_pretrained`` load pruned models. The names
below are imported when they are first used, so that the mathematics brings in no Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from loram_ray.errors import LoramError
from loram_ray.models.registration import register_on_first_use

if TYPE_CHECKING:
    from loram_ray.config import (
        AlignConfig,
        BatchConfig,
        CalibrationConfig,
        CompareConfig,
        EvaluateConfig,
        ExportConfig,
        MergeConfig,
        PruneConfig,
        PublishConfig,
        QuantizeConfig,
        RayConfig,
        RecoverConfig,
        RunConfig,
        SweepConfig,
        TrainConfig,
        load_run,
    )
    from loram_ray.models.loading import load_pruned
    from loram_ray.plan import PruningPlan
    from loram_ray.reporting.write import report
    from loram_ray.stages.align import align
    from loram_ray.stages.evaluate import evaluate
    from loram_ray.stages.export import export
    from loram_ray.stages.merge import merge
    from loram_ray.stages.prune import prune
    from loram_ray.stages.publish import publish
    from loram_ray.stages.quantize import quantize
    from loram_ray.stages.recover import recover
    from loram_ray.stages.run import run
    from loram_ray.stages.train import train
    from loram_ray.studies.batch import batch
    from loram_ray.studies.compare import compare
    from loram_ray.studies.sweep import sweep

_MODULE_OF = {
    "AlignConfig": "config",
    "BatchConfig": "config",
    "CalibrationConfig": "config",
    "CompareConfig": "config",
    "EvaluateConfig": "config",
    "ExportConfig": "config",
    "MergeConfig": "config",
    "PruneConfig": "config",
    "PruningPlan": "plan",
    "PublishConfig": "config",
    "QuantizeConfig": "config",
    "RayConfig": "config",
    "RecoverConfig": "config",
    "RunConfig": "config",
    "SweepConfig": "config",
    "TrainConfig": "config",
    "align": "stages.align",
    "batch": "studies.batch",
    "compare": "studies.compare",
    "evaluate": "stages.evaluate",
    "export": "stages.export",
    "load_pruned": "models.loading",
    "load_run": "config",
    "merge": "stages.merge",
    "prune": "stages.prune",
    "publish": "stages.publish",
    "quantize": "stages.quantize",
    "recover": "stages.recover",
    "report": "reporting.write",
    "run": "stages.run",
    "sweep": "studies.sweep",
    "train": "stages.train",
}

__all__ = [
    "AlignConfig",
    "BatchConfig",
    "CalibrationConfig",
    "CompareConfig",
    "EvaluateConfig",
    "ExportConfig",
    "LoramError",
    "MergeConfig",
    "PruneConfig",
    "PruningPlan",
    "PublishConfig",
    "QuantizeConfig",
    "RayConfig",
    "RecoverConfig",
    "RunConfig",
    "SweepConfig",
    "TrainConfig",
    "align",
    "batch",
    "compare",
    "evaluate",
    "export",
    "load_pruned",
    "load_run",
    "merge",
    "prune",
    "publish",
    "quantize",
    "recover",
    "report",
    "run",
    "sweep",
    "train",
]

register_on_first_use()


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'loram_ray' has no attribute '{name}'")
    return getattr(importlib.import_module(f"loram_ray.{_MODULE_OF[name]}"), name)
