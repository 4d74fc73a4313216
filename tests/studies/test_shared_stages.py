"""The system loram: its stages are those of `loram run` of the same file; its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import loram_ray as lr
from helpers.comparing import run_of
from loram_ray.commands import COMMAND_OF
from loram_ray.config import load_command, load_run
from loram_ray.stages.run import plan_steps
from loram_ray.studies.claims import CLAIMS
from loram_ray.studies.compare import rows_of
from loram_ray.studies.comparison_table import COLUMNS, as_markdown, table_of
from loram_ray.studies.scores import Score, scores_of
from loram_ray.studies.steps import Cell
from loram_ray.studies.systems import comparison_of

SYSTEMS = ["base", "pruned", "unaligned", "loram", "full"]


def outputs_of(run: lr.RunConfig) -> tuple[set[Path], set[Path]]:
    """Outputs of the run's stages, and those of the comparison's that are not below its own."""
    steps = comparison_of(run.compare).steps.values()
    outputs = {step.config.output for step in steps}  # type: ignore[attr-defined]
    own = {path for path in outputs if path.is_relative_to(run.compare.output)}
    assert len(outputs) == len(steps)
    return {step.config.output for step in plan_steps(run)}, outputs - own  # type: ignore[attr-defined]


def test_the_demo_compares_what_its_run_makes() -> None:
    run = load_run(Path(__file__).parents[2] / "jobs" / "configs" / "demo.yaml")
    made, shared = outputs_of(run)
    assert shared == made == {
        Path("runs/demo") / name
        for name in ("pruned", "aligned", "adapter_pruned", "adapter", "evaluation/loram")
    }  # fmt: skip
    planned = comparison_of(run.compare)
    assert [cell.system for cell in planned.cells] == [
        "base", "full", "pruned", "unaligned", "loram"
    ]  # fmt: skip
    of_run = {step.config.output: step.config for step in plan_steps(run)}  # type: ignore[attr-defined]
    for step in planned.steps.values():
        if (own := of_run.get(step.config.output)) is not None:  # type: ignore[attr-defined]
            assert step.config.model_copy(update={"cache_dir": None}) == own.model_copy(
                update={"cache_dir": None}
            )
    read = [step.config.model for name, step in planned.steps.items() if "unaligned" in name]  # type: ignore[attr-defined]
    assert read[0] == Path("runs/demo/pruned")


@pytest.mark.parametrize(("systems", "unread"), [(SYSTEMS, []), (["base"], ["compare"])])
def test_a_stage_does_not_ignore_a_comparison_that_shares_it(
    tmp_path: Path, systems: list[str], unread: list[str]
) -> None:
    file = tmp_path / "run.yaml"
    tasks = {"t": {"data": "d", "held_out": "h"}}
    compare = {"systems": systems, "tasks": tasks}
    file.write_text(yaml.safe_dump({"base": "b", "output": "o", "train": {}, "compare": compare}))
    loaded = load_command(COMMAND_OF["train"], file)
    assert (loaded.unread, loaded.section.data) == (unread, "d")


@pytest.mark.parametrize(
    ("compare", "shared"),
    [
        ({"train": {"steps": 3}}, {"pruned", "aligned"}),
        ({"seeds": [1]}, set()),
        ({"seeds": [0, 1]}, {"pruned", "aligned", "adapter_pruned", "adapter", "loram"}),
        ({"ratios": [0.35]}, set()),
        ({"systems": ["base", "unaligned"]}, set()),
        ({"systems": []}, set()),
    ],
)
def test_only_equal_stages_are_shared(
    base: Path, tmp_path: Path, compare: dict[str, Any], shared: set[str]
) -> None:
    run = run_of(base, tmp_path, {"systems": SYSTEMS, **compare}, recover={})
    assert {path.name for path in outputs_of(run)[1]} == shared


def test_loram_is_made_as_the_recover_section_says(base: Path, tmp_path: Path) -> None:
    recover = {"correction": True, "correction_lambda": 2.0}
    run = run_of(base, tmp_path, {"systems": SYSTEMS, "correction": True}, recover=recover)
    cells = comparison_of(run.compare).cells
    assert {cell.system for cell in cells} == set(SYSTEMS)
    made, shared = outputs_of(run)
    assert shared == made


def test_the_table_has_the_other_scores_and_the_sizes() -> None:
    cells = [
        Cell("base", "t", None, "b"),
        Cell("loram", "t", 0, "l0", "random", 0.5, "t0"),
        Cell("loram", "t", 1, "l1", "random", 0.5, "t1"),
    ]
    sizes = {"model_parameters": 3_000_000, "model_bytes": 12_000_000}
    trained = {
        "trained_parameters": 20_000,
        "model_parameters": 2_000_000,
        "model_bytes": 8_000_000,
    }
    done: dict[str, dict[str, Any]] = {
        "b": {"answer_perplexity": 9.0, "exact_match": 0.0, **sizes},
        "l0": {"answer_perplexity": 4.0, "exact_match": 0.25, **sizes},
        "l1": {"answer_perplexity": 6.0, "exact_match": 0.75, **sizes},
        "t0": trained,
        "t1": trained,
    }
    rows = rows_of(scores_of(cells, done, "answer_perplexity"), "answer_perplexity")
    head, (base, loram) = table_of(rows)
    assert head == [
        "system", "method", "ratio", "task", "answer perplexity", "exact match", "gain kept",
        "seeds", "trained", "parameters", "bytes",
    ]  # fmt: skip
    assert base == (
        "full base, untouched", "", "", "t", "9", "0.0%", "", "1", "", "3.0 M", "12 MB"
    )  # fmt: skip
    assert loram == (
        "LoRAM", "random", "0.5", "t", "5 ± 1.414", "50.0%", "", "2", "0.02 M", "2.0 M", "8 MB"
    )  # fmt: skip
    assert "| exact match |" in as_markdown(rows, [], "answer_perplexity")
    swapped = rows_of(scores_of(cells, done, "exact_match"), "exact_match")
    assert swapped[1]["mean"] == 0.5
    assert swapped[1]["other_scores"] == {"answer_perplexity": 5.0}


def test_scores_of_earlier_comparisons_have_no_columns_for_what_they_lack() -> None:
    old = {"system": "base", "task": "t", "value": 2.0, "model_parameters": 1, "model_bytes": 2}
    head, _ = table_of(rows_of([Score(**old)], "answer_perplexity"))
    assert {*head} - {"answer perplexity"} == {*COLUMNS, "bytes"} - {"score"}


def test_claims_name_systems_that_exist() -> None:
    known = {"base", "full", "sibling", "pruned", "small", "unaligned", "qloram", "loram"}
    known |= {"causal", "distilled"}
    assert {name.partition(" ")[0] for c in CLAIMS for name in (c.better, c.worse)} <= known
