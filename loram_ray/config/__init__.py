"""Configuration: one pydantic model per stage, and the run file that combines them.

A run file is YAML with one section per stage. Paths that follow from other stages are filled in
(e.g. the pruned model is the input of alignment), so ``loram prune --config f.yaml`` followed by
``loram align --config f.yaml`` works as ``loram run`` does. Errors name the file and the key.
"""

from loram_ray.config.align import AlignConfig, DistillationConfig
from loram_ray.config.base import (
    OptimiserConfig,
    Precision,
    RayConfig,
    Section,
    kind_of,
    merge_settings,
    section_types,
)
from loram_ray.config.batch import BatchConfig, TaskConfig
from loram_ray.config.compare import ALIGNMENTS, CompareConfig
from loram_ray.config.corpus import CorpusConfig, FilterConfig, SourceConfig, TextConfig, TextSource
from loram_ray.config.evaluate import EvaluateConfig
from loram_ray.config.finetune import MergeConfig, RecoverConfig
from loram_ray.config.grids import named, with_values
from loram_ray.config.load import accepts_a_run, load_command, load_run, section_of, validate
from loram_ray.config.prune import CalibrationConfig, PruneConfig
from loram_ray.config.publish import ExportConfig, PublishConfig, QuantizeConfig
from loram_ray.config.run import CHAIN, STAGES, RunConfig, fill_paths, recovers_delta
from loram_ray.config.sweep import RangeConfig, SweepConfig
from loram_ray.config.train import LoraConfig, TrainConfig
from loram_ray.criteria import CRITERIA, Criterion

__all__ = [
    "ALIGNMENTS",
    "AlignConfig",
    "BatchConfig",
    "CalibrationConfig",
    "CompareConfig",
    "CorpusConfig",
    "DistillationConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FilterConfig",
    "LoraConfig",
    "CHAIN",
    "CRITERIA",
    "Criterion",
    "MergeConfig",
    "OptimiserConfig",
    "Precision",
    "PruneConfig",
    "PublishConfig",
    "QuantizeConfig",
    "RangeConfig",
    "RayConfig",
    "RecoverConfig",
    "RunConfig",
    "STAGES",
    "Section",
    "SourceConfig",
    "SweepConfig",
    "TaskConfig",
    "TextConfig",
    "TextSource",
    "TrainConfig",
    "accepts_a_run",
    "fill_paths",
    "kind_of",
    "load_command",
    "load_run",
    "named",
    "merge_settings",
    "recovers_delta",
    "section_of",
    "section_types",
    "validate",
    "with_values",
]
