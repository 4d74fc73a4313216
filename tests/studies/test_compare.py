"""The comparison: its plan, its statistics, and all of it once on a tiny model."""

from __future__ import annotations

import json
import math
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

import loram_ray as lr
from helpers import tiny
from helpers.comparing import run_of
from loram_ray.artifacts.manifest import Manifest, read_manifest
from loram_ray.artifacts.stage_directory import StageResult
from loram_ray.cli.main import app
from loram_ray.config import Section, load_run
from loram_ray.errors import LoramError
from loram_ray.evaluation.uncertainty import gain_kept
from loram_ray.models.base import BaseModel
from loram_ray.studies.claims import CLAIMS, Claim, verdict
from loram_ray.studies.compare import claims_of, rows_of, run_steps
from loram_ray.studies.comparison_table import as_markdown
from loram_ray.studies.scores import Score, read_scores, scores_of, with_others, write_scores
from loram_ray.studies.steps import Cell, Step
from loram_ray.studies.systems import comparison_of


def test_stages_that_systems_share_are_planned_once(base: Path, tmp_path: Path) -> None:
    compare = {"methods": ["random", "magnitude"], "ratios": [0.25, 0.5], "seeds": [0, 1]}
    run = run_of(base, tmp_path, {**compare, "correction": True})
    planned = comparison_of(run.compare)
    counts: dict[str, int] = {}
    for step in planned.steps.values():
        kind = type(step.config).__name__
        counts[kind] = counts.get(kind, 0) + 1
        assert all(need in planned.steps for need in step.needs)
        assert step.config.output == run.compare.output / step.name  # type: ignore[attr-defined,union-attr]
    pruned = 2 * 2 * 2
    assert counts == {
        "PruneConfig": pruned,
        "AlignConfig": 2 * pruned,
        "QuantizeConfig": pruned,
        "TrainConfig": 2 + 4 * pruned,  # on the base for each seed; on each of four models
        "RecoverConfig": 7 * pruned,  # three of them again with the correction
        "EvaluateConfig": 1 + 2 + (1 + 1 + 7) * pruned,  # base, full; pruned, small, LoRAM's
    }
    assert len(planned.cells) == counts["EvaluateConfig"]
    names = list(planned.steps)
    for number, name in enumerate(names):
        assert all(names.index(need) < number for need in planned.steps[name].needs)
    prepared = {
        step.config.cache_dir
        for step in planned.steps.values()
        if isinstance(step.config, lr.AlignConfig)
    }
    assert len(prepared) == 1, "the corpus is tokenised once, and the base asked once for a seed"


@pytest.mark.parametrize(
    ("methods", "more"),
    [
        (["wanda"], {}),
        ({"magnitude": ["4:8"]}, {}),
        (["magnitude"], {"method": "magnitude", "pattern": "unstructured"}),
    ],
)
def test_masks_are_merged_and_neither_quantised_nor_corrected(
    base: Path, tmp_path: Path, methods: Any, more: dict[str, str]
) -> None:
    text = {"sources": [{"path": str(tmp_path / "text.jsonl")}], "samples": 4}
    prune = {"layers": (1, 3), **({"calibration": text} if methods == ["wanda"] else more)}
    ratios = {} if isinstance(methods, dict) else {"ratios": [0.5]}
    compare = {"methods": methods, **ratios, "correction": True}
    planned = comparison_of(run_of(base, tmp_path, compare, prune=prune).compare)
    kinds = {type(step.config).__name__ for step in planned.steps.values()}
    assert "QuantizeConfig" not in kinds
    assert {cell.system for cell in planned.cells} == {
        "base", "full", "pruned", "small", "unaligned", "causal", "distilled"
    }  # fmt: skip
    for step in planned.steps.values():
        if isinstance(step.config, lr.RecoverConfig):
            assert step.config.form == "delta"
    scored = {
        planned.steps[cell.evaluation].config.model  # type: ignore[attr-defined]
        for cell in planned.cells
        if cell.system == "causal"
    }
    assert all(model.endswith("merged") for model in scored)


def test_methods_have_ratios_of_their_own(base: Path, tmp_path: Path) -> None:
    text = {"sources": [{"path": str(tmp_path / "text.jsonl")}], "samples": 4}
    prune = {"layers": (1, 3), "calibration": text, "ratio": 0.9}
    methods = {"random": [0.35, 0.65], "wanda": [0.5, "4:8"]}
    planned = comparison_of(run_of(base, tmp_path, {"methods": methods}, prune=prune).compare)
    found = {
        (config.method, config.pattern, config.ratio if ":" not in config.pattern else None)
        for step in planned.steps.values()
        if isinstance(config := step.config, lr.PruneConfig)
    }
    assert found == {
        ("random", "structured", 0.35),
        ("random", "structured", 0.65),
        ("wanda", "unstructured", 0.5),
        ("wanda", "4:8", None),
    }
    pruned = [cell for cell in planned.cells if cell.system == "pruned"]
    assert [(cell.method, cell.ratio) for cell in pruned] == [
        ("random", 0.35),
        ("random", 0.65),
        ("wanda", 0.5),
        ("wanda 4:8", 0.5),
    ]
    assert len({cell.evaluation for cell in pruned}) == 4


def test_alignments_of_ones_own_are_systems(base: Path, tmp_path: Path) -> None:
    """Each is the align section with its keys over it; what several prepare, one does first."""
    compare = {
        "seeds": [0, 1],
        "correction": True,
        "alignments": {
            "live": {"objective": "distillation", "distillation": {"targets": "live"}},
            "longer": {"objective": "causal_lm", "steps": 9},
            "warm": {"objective": "distillation", "distillation": {"temperature": 2.0}},
            "distilled": {"distillation": {"top_k": 7}},
        },
    }
    planned = comparison_of(run_of(base, tmp_path, compare).compare)
    named = {cell.system for cell in planned.cells}
    assert {"live", "longer", "warm", "live + correction", "distilled", "qloram"} <= named
    found = {
        name.partition("-0-")[2]: step
        for name, step in planned.steps.items()
        if isinstance(step.config, lr.AlignConfig) and "-0-" in name
    }
    said = {
        name: (config.objective, config.steps, config.distillation.targets,
               config.distillation.top_k, config.distillation.temperature)
        for name, step in found.items()
        if isinstance(config := step.config, lr.AlignConfig)
    }  # fmt: skip
    assert said == {
        "causal": ("causal_lm", 2, "cached", 64, 1.0),
        "distilled": ("distillation", 2, "cached", 7, 1.0),
        "live": ("distillation", 2, "live", 64, 1.0),
        "longer": ("causal_lm", 9, "cached", 64, 1.0),
        "warm": ("distillation", 2, "cached", 64, 2.0),
    }
    root = "models/random-0.65-0"
    pruned, corpus, targets = f"{root}-pruned", f"{root}-causal", f"{root}-distilled"
    assert {name: set(step.needs) for name, step in found.items()} == {
        "causal": {pruned},
        "distilled": {pruned, corpus},
        "live": {pruned, corpus},
        "longer": {pruned, corpus},
        "warm": {pruned, corpus, targets},
    }
    ratios = {**compare, "ratios": [0.35, 0.65]}
    of_two = comparison_of(run_of(base, tmp_path, ratios).compare).steps[
        "models/random-0.65-0-warm"
    ]
    assert "models/random-0.35-0-warm" in of_two.needs, "both would write the same targets"
    second = planned.steps["models/random-0.65-1-distilled"]
    assert set(second.needs) == {"models/random-0.65-1-pruned", corpus}, "its targets are others"


@pytest.mark.parametrize(
    "systems",
    [["base"], ["distilled"], ["longer"], ["small"], ["qloram"], ["pruned", "causal"], []],
)
def test_no_step_is_for_nothing(systems: list[str], base: Path, tmp_path: Path) -> None:
    compare = {"systems": systems, "seeds": [0, 1], "alignments": {"longer": {"steps": 9}}}
    planned = comparison_of(run_of(base, tmp_path, compare).compare)
    wanted, reached = [cell.evaluation for cell in planned.cells], set[str]()
    while wanted:
        name = wanted.pop()
        reached.add(name)
        wanted += planned.steps[name].needs
    assert reached == set(planned.steps)


def test_a_comparison_cut_short_has_whole_ones_of_its_first_seeds(
    base: Path, tmp_path: Path
) -> None:
    compare = {"ratios": [0.25, 0.5], "seeds": [4, 7]}
    planned = comparison_of(run_of(base, tmp_path, compare).compare)
    of_first = set(comparison_of(run_of(base, tmp_path, {**compare, "seeds": [4]}).compare).steps)
    assert set(list(planned.steps)[: len(of_first)]) == of_first


def test_the_study_compares_all_systems_over_three_seeds() -> None:
    run = load_run(Path(__file__).parents[1] / "benchmarks" / "study" / "study.yaml")
    cells = comparison_of(run.compare).cells
    pruned = {"pruned", "small", "unaligned", "causal", "distilled", "qloram"}
    assert {cell.system.partition(" ")[0] for cell in cells} == {"base", "full", *pruned}
    assert {(cell.method, cell.ratio) for cell in cells if cell.method is not None} == {
        ("random", 0.35), ("random", 0.65), ("wanda", 0.5)
    }  # fmt: skip
    assert {cell.seed for cell in cells if cell.system != "base"} == {0, 1, 2}
    assert len({cell.task for cell in cells}) == 2


def test_the_objectives_are_compared_by_their_command() -> None:
    """ALIGNMENT.md's command: its systems, beside those whose scores it counts in."""
    benchmarks = Path(__file__).parents[1] / "benchmarks"
    lines = (benchmarks / "ALIGNMENT.md").read_text().splitlines()
    [words] = [shlex.split(line) for line in lines if line.startswith("loram compare ")]
    overrides = [value for key, value in zip(words, words[1:], strict=False) if key == "--set"]
    repository = benchmarks.parents[1]
    run = load_run(repository / words[words.index("--config") + 1], overrides)
    assert run.compare is not None
    planned = comparison_of(run.compare)
    assert {cell.system for cell in planned.cells} == {"base", "live", "longer"}
    assert {(cell.ratio, cell.seed) for cell in planned.cells if cell.system == "live"} == {
        (ratio, seed) for ratio in (0.35, 0.65) for seed in (0, 1, 2)
    }
    files = [repository / path for path in run.compare.merge_scores]
    others = read_scores(files, run.compare.metric, planned.cells)
    assert {score.system for score in others} >= {"full", "causal", "distilled"}
    assert {score.seed for score in others} == {None, 0, 1, 2}


@pytest.mark.parametrize(
    ("compare", "sections", "message"),
    [
        ({"systems": ["distilled"]}, {"align": None}, "got distilled without align"),
        ({"systems": ["pruned"]}, {"prune": None}, "got pruned without prune"),
        ({}, {"train": None}, "compare needs the section train"),
        ({"methods": ["no_such"]}, {}, "method no_such.* must be|method must be"),
        ({"ratios": [1.5]}, {}, "ratio must be"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    base: Path, tmp_path: Path, compare: dict[str, Any], sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(LoramError, match=message) as caught:
        comparison_of(run_of(base, tmp_path, compare, **sections).compare)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("compare", "message"),
    [
        ({"systems": ["sibling"]}, "sibling must be given for system sibling"),
        ({"systems": ["base", "live"]}, "systems must be among base, .*, distilled, got live"),
        ({"alignments": {"qloram": {}}}, "must not use the name of another system, got qloram"),
        ({"alignments": {"a b": {}}}, "alignments"),
        ({"seeds": [1, 1]}, "must have distinct values, got 1 twice"),
        ({"tasks": {}}, "tasks"),
        ({"methods": {"random": []}}, "must have ratios for random, got none"),
        ({"methods": {"random": [0.5, 0.5]}}, "must have distinct values, got 0.5 twice"),
        ({"methods": {"wanda": ["4-8"]}}, "methods"),
        ({"methods": {"random": [0.5]}, "ratios": [0.3]}, "ratios must not be given if methods"),
    ],
)
def test_bad_settings_are_refused(
    base: Path, tmp_path: Path, compare: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run_of(base, tmp_path, compare)


def result_of(name: str, **details: Any) -> StageResult:
    return StageResult(Path(name), Manifest("stage", name, "", {}, {}, details=details), False)


def step(name: str, *needs: str) -> Step:
    return Step(name, Section(), needs)


def test_steps_run_after_those_they_need_and_a_failure_harms_no_other() -> None:
    steps = {s.name: s for s in (
        step("a"), step("b", "a"), step("c", "a"), step("d", "b", "c"), step("e", "c"), step("f"),
    )}  # fmt: skip
    order: list[str] = []

    def do(one: Step) -> StageResult:
        order.append(one.name)
        if one.name == "b":
            raise LoramError("b is broken")
        return result_of(one.name)

    done, failed = run_steps(steps, do, max_concurrent=1)
    assert failed == {"b": "b is broken", "d": "requires b, which failed"}
    assert set(done) == {"a", "c", "e", "f"}
    assert order.index("a") < order.index("c") < order.index("e")


def test_as_many_steps_run_at_a_time_as_may() -> None:
    inside, most, lock = 0, 0, threading.Lock()

    def do(one: Step) -> StageResult:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.02)
        with lock:
            inside -= 1
        return result_of(one.name)

    run_steps({f"s{n}": step(f"s{n}") for n in range(9)}, do, max_concurrent=3)
    assert most == 3


def test_steps_that_begin_at_once_in_a_fresh_process_all_find_transformers(base: Path) -> None:
    code = f"""
import threading
from types import SimpleNamespace
from loram_ray.studies.compare import run_steps
from loram_ray.models.tokenizer import load_tokenizer
both = threading.Barrier(2)
def do(step):
    both.wait()
    load_tokenizer({str(base)!r})
    return SimpleNamespace(skipped=False, manifest=SimpleNamespace(details={{}}))
done, failed = run_steps(dict.fromkeys("ab", SimpleNamespace(needs=())), do, 2)
assert set(done) == {{"a", "b"}}, failed
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_interrupt_waits_for_no_step() -> None:
    over = threading.Event()
    was = signal.signal(signal.SIGINT, signal.default_int_handler)

    def do(one: Step) -> StageResult:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        over.wait(60)
        over.set()
        return result_of(one.name)

    try:
        with pytest.raises(KeyboardInterrupt):
            run_steps({"a": step("a"), "b": step("b", "a")}, do, max_concurrent=2)
        assert not over.is_set()
    finally:
        over.set()
        signal.signal(signal.SIGINT, was)


def test_what_is_no_users_mistake_ends_the_comparison() -> None:
    def do(one: Step) -> StageResult:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_steps({"a": step("a"), "b": step("b")}, do, max_concurrent=1)


def test_gain_kept_is_that_of_the_method() -> None:
    assert gain_kept("answer_perplexity", 6.31, 5.915, 5.36) == pytest.approx(
        math.log(6.31 / 5.915) / math.log(6.31 / 5.36)
    )
    # LLaMA-3.1-70B on GSM8K in the paper: 93%
    assert gain_kept("gsm8k/exact_match", 75.28, 80.36, 80.74) == pytest.approx(0.93, abs=0.005)
    assert gain_kept("answer_perplexity", 5.0, 5.0, 5.5) is None
    assert gain_kept("answer_perplexity", math.inf, 5.0, 5.5) is None


def goodness_of(**tasks: list[float]) -> dict[tuple[str, int], float]:
    return {(task, seed): v for task, found in tasks.items() for seed, v in enumerate(found)}


def test_a_claim_is_seen_where_its_interval_is_above_zero() -> None:
    """Against Student's t with four degrees of freedom, worked out by hand: 2.776."""
    claim = CLAIMS[0]
    zero = goodness_of(t=[0.0] * 5)
    found = verdict(claim, goodness_of(t=[1.0, 2.0, 3.0, 4.0, 5.0]), zero)
    assert found.difference == 3.0
    assert found.interval == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5), rel=1e-3)
    assert found.seen == "seen"
    assert verdict(claim, zero, goodness_of(t=[1.0, 2.0, 3.0, 4.0, 5.0])).seen == "not seen"
    held = verdict(claim, goodness_of(t=[1.0, -2.0, 3.0, -4.0, 5.0]), zero)
    assert held.seen == "within noise"
    alone = verdict(claim, goodness_of(a=[1.0]), goodness_of(a=[0.5], b=[0.0]))
    assert (alone.seen, alone.interval, alone.pairs) == ("one pair", None, 1)
    assert verdict(claim, zero, zero).seen == "within noise"


def test_noise_is_that_of_seeds_within_tasks() -> None:
    """Against a linear model with a mean of its own for each task, fitted by least squares."""
    pairs = goodness_of(a=[1.0, 1.2, 1.1], b=[6.0, 6.3], c=[3.0, 2.9, 3.2])
    found = verdict(CLAIMS[0], pairs, dict.fromkeys(pairs, 0.0))
    tasks = sorted({task for task, _ in pairs})
    design = np.array([[float(task == other) for other in tasks] for task, _ in pairs])
    values = np.array(list(pairs.values()))
    means, squares, *_ = np.linalg.lstsq(design, values)
    weights = np.full(3, 1 / 3)
    variance = squares[0] / 5 * (weights @ np.linalg.inv(design.T @ design) @ weights)
    assert found.difference == pytest.approx(weights @ means)
    assert found.interval == pytest.approx(2.571 * math.sqrt(variance), rel=1e-3)
    assert (found.seen, found.pairs) == ("seen", 8)
    once = goodness_of(a=[1.0], b=[6.0])  # of one seed: what tasks differ by
    of_tasks = verdict(CLAIMS[0], once, dict.fromkeys(once, 0.0))
    assert of_tasks.interval == pytest.approx(12.706 * 2.5, rel=1e-3)
    assert of_tasks.seen == "within noise"


def test_rows_and_claims_are_over_seeds() -> None:
    def cell(system: str, seed: int | None, *of: Any) -> Cell:
        return Cell(system, "t", seed, f"{system}{seed}", *of)

    cells = [cell("base", None), cell("full", 0), cell("full", 1)]
    cells += [cell("causal", seed, "random", 0.5) for seed in (0, 1)]
    values = {"baseNone": 8.0, "full0": 4.0, "full1": 2.0, "causal0": 6.0, "causal1": 4.0}
    done = {
        name: {"answer_perplexity": value, "model_parameters": 1, "model_bytes": 2}
        for name, value in values.items()
    }
    scores = scores_of(cells, done, "answer_perplexity")
    rows = {row["system"]: row for row in rows_of(scores, "answer_perplexity")}
    assert rows["causal"]["mean"] == 5.0
    assert rows["causal"]["deviation"] == pytest.approx(math.sqrt(2))
    kept = [math.log(8 / 6) / math.log(2), math.log(8 / 4) / math.log(4)]
    assert rows["causal"]["gain_kept"] == pytest.approx(sum(kept) / 2)
    assert rows["full"]["gain_kept"] == 1.0
    assert rows["base"]["gain_kept"] is None
    claims = {claim["claim"]: claim for claim in claims_of(scores, "answer_perplexity")}
    better = claims["LoRAM improves on the untouched base"]
    assert better["pairs"] == 2
    assert better["difference"] == pytest.approx((math.log(8 / 6) + math.log(8 / 4)) / 2)
    assert (better["method"], better["ratio"]) == ("random", 0.5)
    assert "alignment is needed" not in claims
    assert isinstance(CLAIMS[0], Claim)


def test_claims_about_alignments_of_ones_own() -> None:
    of = {"method": "random", "ratio": 0.5}
    values = {"causal": 6.0, "distilled": 4.0, "live": 5.0, "live + correction": 1.0}
    scores = [scored(name, 0, value, **of) for name, value in values.items()]
    found = {
        (claim["better"], claim["worse"]): claim
        for claim in claims_of(scores, "answer_perplexity")
        if "live" in claim["claim"]
    }
    assert found["live", "causal"]["difference"] == pytest.approx(math.log(6 / 5))
    assert found["distilled", "live"]["difference"] == pytest.approx(math.log(5 / 4))
    assert found["live + correction", "live"]["difference"] == pytest.approx(math.log(5))
    assert len(found) == 3 and not any(claim["paper"] for claim in found.values())
    page = as_markdown(rows_of(scores, "answer_perplexity"), [], "answer_perplexity")
    assert "LoRAM, alignment live + correction" in page


def scored(system: str, seed: int | None, value: float, **of: Any) -> Score:
    return Score(
        system=system, task="t", seed=seed, value=value, model_parameters=1, model_bytes=2, **of
    )


def one_of_each(seed: int, base: float = 8.0) -> list[Score]:
    """A base, LoRA on it, and LoRAM, whose seeds differ."""
    values = {"full": 4.0 - seed, "causal": 6.0 - seed}
    return [scored("base", None, base)] + [
        scored(system, seed, value, **({"method": "random", "ratio": 0.5} if i else {}))
        for i, (system, value) in enumerate(values.items())
    ]


def planned_of(scores: list[Score]) -> list[Cell]:
    return [Cell(s.system, s.task, s.seed, "", s.method, s.ratio) for s in scores]


def test_seeds_of_several_machines_are_those_of_one(tmp_path: Path) -> None:
    """A comparison whose seeds were run apart says what it says when they ran together."""
    metric = "answer_perplexity"
    files = [tmp_path / f"{seed}.json" for seed in (1, 2)]
    for seed, file in enumerate(files, start=1):
        write_scores(file, one_of_each(seed, base=8.0001), metric)  # another machine rounds
    own = one_of_each(0)
    found = with_others(own, read_scores(files, metric, planned_of(own)))
    together = own + one_of_each(1)[1:] + one_of_each(2)[1:]
    assert found == together
    assert rows_of(found, metric)[0]["seeds"] == 1
    assert [row["seeds"] for row in rows_of(found, metric)[1:]] == [3, 3]
    assert claims_of(found, metric) == claims_of(together, metric)


@pytest.mark.parametrize(
    ("scores", "metric", "says"),
    [
        (
            one_of_each(0),
            "answer_perplexity",
            "must have other seeds, .* also has full on t, seed 0",
        ),
        (one_of_each(1), "sums/exact_match", "must contain scores of answer_perplexity"),
        (one_of_each(1, base=8.1), "answer_perplexity", "base on t has 8.1 there and 8 here"),
        (
            [],
            "answer_perplexity",
            "must be scores.json files of comparisons, .*scores: Field required",
        ),
        (None, "answer_perplexity", "does not exist; remove it"),
    ],
)
def test_scores_that_do_not_belong_are_refused(
    tmp_path: Path, scores: list[Score] | None, metric: str, says: str
) -> None:
    file, own = tmp_path / "scores.json", one_of_each(0)
    if scores:
        write_scores(file, scores, metric)
    elif scores is not None:
        file.write_text('{"metric": "answer_perplexity"}')
    with pytest.raises(LoramError, match=says):
        with_others(own, read_scores([file], "answer_perplexity", planned_of(own)))


SYSTEMS = ("base", "full", "pruned", "small", "unaligned", "causal", "distilled", "qloram")


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize(
    "systems",
    [("base", "full", "unaligned"), pytest.param(SYSTEMS, marks=pytest.mark.thorough)],
    ids=["some", "all"],
)
def test_systems_of_a_tiny_model(
    base: Path, tmp_path: Path, embedded_ray: None, systems: tuple[str, ...]
) -> None:
    """Each score is of what its name says, by its lineage; a second call runs nothing again."""
    compare = {"ratios": [0.5], "seeds": [3], "correction": True, "systems": systems}
    run = run_of(base, tmp_path, compare)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(json.loads(run.model_dump_json(exclude_none=True))))
    shown = CliRunner().invoke(app, ["compare", "--config", str(file)], catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    output = tmp_path / "run" / "comparison"
    rows = {row["system"]: row for row in json.loads((output / "results.json").read_text())}
    corrected = [name for name in systems if name in ("causal", "distilled", "qloram")]
    assert set(rows) == {*systems, *(f"{name} + correction" for name in corrected)}
    assert all(row["seeds"] == 1 for row in rows.values())
    assert rows["base"]["gain_kept"] is None
    assert rows["full"]["gain_kept"] in (1.0, None)
    assert pq.read_table(output / "results.parquet").num_rows == len(rows)
    kept = json.loads((output / "scores.json").read_text())["scores"]
    assert {one["system"]: one["value"] for one in kept} == {
        name: row["mean"] for name, row in rows.items()
    }
    assert "LoRAM without alignment" in (output / "comparison.md").read_text()
    planned = comparison_of(run.compare)
    made = {name: read_manifest(output / name) for name in planned.steps}
    of_base = BaseModel(base, "base").identify()[0]
    by_digest = {m.digest: name for name, m in made.items() if m is not None} | {of_base: "BASE"}
    for cell in planned.cells:
        scores = made[cell.evaluation]
        assert scores is not None
        assert rows[cell.system]["mean"] == scores.details["answer_perplexity"]
        parents = {role: by_digest.get(digest) for role, digest in scores.parents.items()}
        system, _, correction = cell.system.partition(" ")
        aligned = {"qloram": "quantized", "unaligned": "pruned", "small": "causal"}.get(
            system, system
        )
        model = f"models/random-0.5-3-{aligned}"
        if system in ("base", "full"):
            assert parents["model"] == "BASE"
        elif system in ("pruned", "small"):
            assert parents["model"] == model
        if system in ("base", "pruned"):
            assert "adapter" not in parents
            continue
        assert cell.training is not None
        trained = made[cell.training]
        assert trained is not None
        assert by_digest[trained.parents["model"]] == ("BASE" if system == "full" else model)
        if system in ("full", "small"):
            assert parents["adapter"] == cell.training
            continue
        assert parents["model"] == "BASE"
        recovered = made[str(parents["adapter"])]
        assert recovered is not None
        assert recovered.stage == "recover"
        assert by_digest[recovered.parents["adapter"]] == cell.training
        assert recovered.settings.get("correction", False) == bool(correction)
    assert bool([*(output / "models" / "prepared").glob("targets-*")]) == ("distilled" in systems)
    assert not list((output / "models").glob("*_corpus"))
    page = lr.report(output, tmp_path / "page").read_text()
    for said in ("Quality against reduction: sums", "KV heads", "Training loss: train"):
        assert said in page
    before = tiny.tree(output)
    again = lr.compare(run.compare, run.ray)
    assert not again.failed
    assert tiny.tree(output) == before
