"""What identifies the output of a stage, as each key of its section declares."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

import loram_ray.config as config
from loram_ray.config.base import Free, Identified, InIdentity, Section
from loram_ray.config.marks import EqualInTrials, SetByComparison, SetByStudy, keys_with
from loram_ray.stages.evaluate import _settings as settings_of_evaluation
from loram_ray.stages.train import _settings as settings_of_training

BEFORE: dict[str, Any] = {
    "PruneConfig": {
        "base": True,
        "output": True,
        "scores": True,
        "calibration": {"sources", "workers", "cpus_per_worker", "max_failures"},
    },
    "AlignConfig": {
        "pruned", "output", "base", "corpus", "prepared", "distillation", "steps", "tokens",
        "micro_batch_size", "workers", "min_workers", "cpus_per_worker", "activation_checkpointing",
        "offload_optimiser", "offload_parameters", "offload_folder", "deepspeed", "evaluate_every",
        "evaluate_sequences", "trackers", "peak_tflops", "log_rows", "checkpoint_every",
        "keep_checkpoints", "staging_folder", "max_failures",
    },
    "DistillationConfig": {"workers", "gpus_per_worker", "batch_size", "stream_rows"},
    "TrainConfig": {
        "model", "output", "data", "eval_data", "chat_template", "cpus", "gpus", "max_failures",
        "checkpoint_every", "activation_checkpointing", "preset", "eval_every", "patience",
    },
    "EvaluateConfig": {
        "model", "adapter", "output", "data", "chat_template", "text", "actors", "cpus", "gpus",
        "max_failures",
    },
    "SweepConfig": {
        "model", "models", "base", "output", "data", "actors", "cpus", "gpus", "max_failures",
        "prune", "align", "models_dir",
    },
    "SourceConfig": {"path", "text_field"},
}  # fmt: skip
"""What stages left out of the identities of directories that are to stay valid."""
FORMER: dict[str, dict[str, str]] = {
    "AlignConfig": {
        "cache_dir": "prepared", "offload_dir": "offload_folder", "staging_dir": "staging_folder",
    },
    "TrainConfig": {"evaluate_every": "eval_every"},
    "EvaluateConfig": {"workers": "actors", "cpus_per_worker": "cpus", "gpus_per_worker": "gpus"},
    "SweepConfig": {"workers": "actors", "cpus_per_worker": "cpus", "gpus_per_worker": "gpus"},
}  # fmt: skip
"""Names of renamed keys in the identities of those directories."""
CALIBRATION = {"sources": [{"path": "text.jsonl"}], "workers": 3, "samples": 7}
SOURCES = {"sources": [{"path": "web/*.jsonl", "name": "web", "filters": {"keep": "a+"}}]}
SECTIONS: list[Section] = [
    config.PruneConfig(base="b", output="o", ratio=0.3, layers=(1, 3), seed=4),
    config.PruneConfig(base="b", output="o", method="taylor", calibration=CALIBRATION),
    config.PruneConfig(base="b", output="o", method="wanda", pattern="2:4", scores="s"),
    config.AlignConfig(pruned="p", output="o", corpus=SOURCES, base="b", tokens=1_000_000),
    config.AlignConfig(
        pruned="p", output="o", corpus=SOURCES, objective="causal_lm", steps=3, workers=4,
        optimiser={"learning_rate": 1e-3}, zero_stage=3, offload_parameters="cpu", max_hours=1,
    ),
    config.DistillationConfig(top_k=8, workers=2, stream_rows=64),
    config.TrainConfig(model="m", output="o", data="d", preset="paper", gpus=0.5),
    config.TrainConfig(
        model="m", output="o", data="d", eval_data="e", patience=3, evaluate_every=7,
        lora={"r": 4, "rank_pattern": {"q_proj": 2}}, optimiser={"name": "adamw"}, cpus=3,
    ),
    config.EvaluateConfig(model="m", output="o", data="d", adapter="a", limit=3, workers=2),
    config.SweepConfig(
        model="m", output="o", data="d", grid={"lora.r": (2, 4)}, trials=5,
        train={"eval_share": 0.1},
        ranges={"optimiser.learning_rate": {"low": 1e-5, "high": 1e-3, "log": True}},
    ),
    config.CorpusConfig(**SOURCES, seed=3).sources[0],
]  # fmt: skip
EVALUATION = config.EvaluateConfig(
    model="m",
    output="o",
    text={"sources": [{"path": "t.txt"}]},
    benchmarks=[
        {"kind": "choice", "data": "d.jsonl", "shots": 2, "shots_from": "s.jsonl"},
        {"kind": "perplexity", "name": "text", "text": {"sources": [{"path": "t.txt"}]}},
        {"kind": "code", "data": "problems.jsonl", "samples": 4, "pass_at": (1, 2)},
        {"kind": "reasoning_gym", "dataset": "chain_sum", "options": {"min_terms": 2}},
    ],
    lm_eval={"tasks": ["gsm8k"], "include_path": "tasks"},
)


def recorded_before(section: Section, without: dict[str, Any] | set[str]) -> dict[str, Any]:
    """A section's settings as they were recorded, under former names and without some keys."""
    names = FORMER.get(type(section).__name__, {})
    dump = {names.get(key, key): value for key, value in section.model_dump(mode="json").items()}
    for key in without:
        inner = without[key] if isinstance(without, dict) else True
        if inner is True:
            del dump[key]
        elif dump[key] is not None:
            dump[key] = {k: value for k, value in dump[key].items() if k not in inner}
    return dump


def sections_of_stages() -> list[type[Section]]:
    modules = [module for _, module in inspect.getmembers(config, inspect.ismodule)]
    found = {
        section
        for module in modules
        for _, section in inspect.getmembers(module, inspect.isclass)
        if issubclass(section, Section)
        and section.has_identity
        and section.__module__ != "loram_ray.config.run"  # a run writes no output of its own
    }
    return sorted(found - {Section}, key=lambda section: section.__name__)


def test_the_sections_of_all_stages_that_write_an_output_have_an_identity() -> None:
    names = {section.__name__ for section in sections_of_stages()}
    assert set(BEFORE) <= names
    assert {"RecoverConfig", "MergeConfig", "QuantizeConfig", "ExportConfig"} <= names
    assert not names & {"BatchConfig", "CompareConfig", "PublishConfig", "RayConfig"}


@pytest.mark.parametrize("section", sections_of_stages())
def test_every_key_says_whether_it_is_part_of_the_identity(section: type[Section]) -> None:
    for name, field in section.model_fields.items():
        said = [mark for mark in field.metadata if isinstance(mark, InIdentity)]
        assert len(said) == 1, f"{section.__name__}.{name} must be Identified or Free"


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: type(section).__name__)
def test_identities_are_those_of_directories_written_before(section: Section) -> None:
    excluded = BEFORE[type(section).__name__]
    assert section.identity() == recorded_before(section, excluded)


@pytest.mark.parametrize("section", [s for s in SECTIONS if isinstance(s, config.TrainConfig)])
def test_a_training_s_evaluations_identify_it_where_it_has_some(
    section: config.TrainConfig,
) -> None:
    of_evaluation = set() if section.evaluates else {"eval_every", "patience"}
    excluded = BEFORE["TrainConfig"] - {"eval_every", "patience"} | of_evaluation
    assert settings_of_training(section) == recorded_before(section, excluded)


def test_a_benchmark_is_identified_by_all_but_where_its_data_is() -> None:
    expected = recorded_before(EVALUATION, BEFORE["EvaluateConfig"])
    names = ("d", "text", "problems", "chain_sum")
    for given, name in zip(expected["benchmarks"], names, strict=True):
        given["name"] = name
        for place in ("data", "shots_from", "text"):
            given.pop(place, None)
    expected["lm_eval"].pop("include_path")
    assert settings_of_evaluation(EVALUATION) == expected


def test_a_training_s_keys_say_which_of_them_studies_set_and_compare_trials_by() -> None:
    whole = {"model", "output", "data", "cpus", "gpus", "max_failures"}
    assert keys_with(config.TrainConfig, SetByStudy()) == whole
    compared = {"steps", "seed", "max_length", "chat_template", "eval_data", "eval_share"}
    assert keys_with(config.TrainConfig, EqualInTrials()) == compared | {"evaluate_every"}


def test_a_comparison_sets_what_its_stages_read_and_where_they_write() -> None:
    own = {
        config.PruneConfig: {"base", "output"},
        config.AlignConfig: {"base", "pruned", "output"},
        config.TrainConfig: {"model", "data", "output"},
        config.RecoverConfig: {"adapter", "base", "model", "output"},
        config.EvaluateConfig: {"model", "adapter", "data", "output"},
    }
    for section, keys in own.items():
        assert keys_with(section, SetByComparison()) == keys


def test_free_keys_are_left_out_wherever_sections_are() -> None:
    class Inner(Section):
        kept: Identified[int] = 1
        moved: Free[Path] = Path("here")

    class Outer(Section):
        one: Identified[Inner | None] = None
        several: Identified[tuple[Inner, ...]] = (Inner(), Inner(kept=2))
        named: Identified[dict[str, Inner]] = {"a": Inner(kept=3)}
        place: Free[str] = "there"

    assert Outer(one=Inner()).identity() == {
        "one": {"kept": 1},
        "several": [{"kept": 1}, {"kept": 2}],
        "named": {"a": {"kept": 3}},
    }
    assert Outer().identity()["one"] is None
