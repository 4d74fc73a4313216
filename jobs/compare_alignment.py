"""The objectives of alignment on a real model, by the share of full LoRA's gain that they keep.

    python jobs/prepare_demo.py --output runs/demo/inputs
    python jobs/compare_alignment.py --inputs runs/demo/inputs --output runs/objectives

LoRAM-Rand of SmolLM2-135M, layers 4 to 27, at two ratios. A pruned model is left as it is, or
aligned by the paper's causal-LM loss, or by distillation from the base, cached or live; then a LoRA
is trained on it and recovered, and the base with it is scored on held-out answers. *Equal tokens*
means 1,024 tokens a step for all. *Equal compute* gives the causal-LM loss as many steps more as
the base's forward pass costs: a step is counted as 6 operations a token for each parameter that is
trained and 2 for each that is only run.

A study that was cut goes on where it stopped. ``--rows FILE`` keeps what was measured in a file of
its own, so that a study of many hours can be done in parts, on several machines; the table of all
its rows is written beside it after every row. ``--seeds 0 1 2`` repeats pruning, order and training
with other seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from study import SEQUENCE, Study, Training, study_parser

import loram_ray as lr
from loram_ray.cluster import ray_session

LAYERS = (4, 28)
RATIOS = (0.35, 0.65)
BATCH = 4


@dataclass(frozen=True)
class Objective:
    """A row's alignment.

    Attributes:
        name: in the table.
        folder: name of its directory.
        settings: of the align stage, or None for no alignment.
        pays_for_base: whether it has the steps that the base's forward passes would have cost.
    """

    name: str
    folder: str
    settings: dict[str, Any] | None = field(default_factory=dict)
    pays_for_base: bool = False


def distilled(name: str, folder: str, **settings: object) -> Objective:
    """A row of distillation."""
    return Objective(name, folder, {"objective": "distillation", "distillation": settings})


OBJECTIVES = (
    Objective("none", "none", None),
    Objective("causal-LM (the paper)", "causal", {"objective": "causal_lm"}),
    distilled("distilled, 64 likeliest tokens", "top64"),
    distilled("distilled, live", "live", targets="live"),
    Objective(
        "causal-LM, equal compute",
        "causal-long",
        {"objective": "causal_lm"},
        pays_for_base=True,
    ),
    distilled("distilled, 8 likeliest tokens", "top8", top_k=8),
    distilled("half distilled, half causal-LM", "half", causal_lm_weight=0.5),
    distilled("distilled at temperature 2", "warm", temperature=2.0),
    distilled(
        "distilled, live, and hidden states",
        "hidden",
        targets="live",
        hidden_layers=(9, 19, 29),
    ),
)


@dataclass(frozen=True)
class Row:
    """A measurement.

    Attributes:
        ratio: of the pruning.
        seed: of pruning, data order and LoRA.
        objective: the folder of one of `OBJECTIVES`.
        steps: of alignment.
        text: perplexity of the aligned model on held-out text.
        answers: perplexity of the base with the recovered LoRA on held-out answers.
        gain_kept: what that is of the gain of a LoRA on the base itself.
    """

    ratio: float
    seed: int
    objective: str
    steps: int
    text: float
    answers: float
    gain_kept: float


Cell = tuple[float, int, str]


def measure(arguments: argparse.Namespace, known: Collection[Cell]) -> Iterator[Row]:
    """Yield the rows that are not known, seed by seed."""
    chosen = [o for o in OBJECTIVES if not arguments.only or o.folder in arguments.only]
    for seed in arguments.seeds:
        training = Training(steps=2 if arguments.quick else 80, warmup_steps=8, seed=seed)
        study = Study(arguments.inputs, arguments.output, training, 8 if arguments.quick else None)
        root = arguments.output / f"seed-{seed}"

        @cache
        def ends(study: Study = study, root: Path = root) -> tuple[float, float]:
            """The untouched base and the LoRA on it."""
            base = study.answer_perplexity(study.base, arguments.output / "base")
            return base, study.answer_perplexity(study.full_lora(root / "full"), root / "full")

        for ratio in arguments.ratios:
            for objective in chosen:
                if (ratio, seed, objective.folder) in known:
                    continue
                pruned = lr.prune(
                    lr.PruneConfig(
                        base=study.base,
                        output=root / f"{ratio}" / "pruned",
                        ratio=ratio,
                        layers=LAYERS,
                        seed=seed,
                    )
                )
                folder = root / f"{ratio}" / objective.folder
                steps = steps_of(objective, pruned.manifest.details, arguments.steps)
                model = aligned(study, objective, pruned.output, folder, steps, seed)
                answers = study.answer_perplexity(study.adapted(model, folder), folder)
                base, full = ends()
                yield Row(
                    ratio,
                    seed,
                    objective.folder,
                    steps,
                    study.text_perplexity(model, folder),
                    answers,
                    study.gain_kept(base, answers, full),
                )


def steps_of(objective: Objective, pruned: dict[str, Any], steps: int) -> int:
    """Optimiser steps of a row."""
    if objective.settings is None:
        return 0
    if objective.pays_for_base:
        share = 2 * pruned["base_parameters"] / (6 * pruned["parameters"])
        return round(steps * (1 + share))
    return steps


def aligned(
    study: Study, objective: Objective, pruned: Path, folder: Path, steps: int, seed: int
) -> Path:
    """Align a pruned model."""
    if objective.settings is None:
        return pruned
    config = lr.AlignConfig(
        pruned=pruned,
        base=study.base,
        output=folder / "aligned",
        corpus={"sources": [{"path": str(study.text)}], "sequence_length": SEQUENCE},
        steps=steps,
        batch_size=BATCH,
        micro_batch_size=BATCH,
        cpus_per_worker=2,
        optimiser={"learning_rate": 3e-4, "warmup_steps": 10},
        checkpoint_every=50,
        seed=seed,
        **objective.settings,
    )
    return lr.align(config).output


def as_markdown(rows: list[Row]) -> str:
    """The table: means over the seeds, and each seed's share of the gain."""
    lines = [
        "| ratio | alignment | steps | text perplexity, pruned | answer perplexity, LoRAM "
        "| gain kept | by seed |",
        "|---|---|---|---|---|---|---|",
    ]
    for ratio in sorted({row.ratio for row in rows}):
        for objective in OBJECTIVES:
            found = [r for r in rows if (r.ratio, r.objective) == (ratio, objective.folder)]
            if not found:
                continue
            kept = [row.gain_kept for row in sorted(found, key=lambda row: row.seed)]
            lines.append(
                f"| {ratio} | {objective.name} | {found[0].steps} "
                f"| {statistics.mean(row.text for row in found):.2f} "
                f"| {statistics.mean(row.answers for row in found):.3f} "
                f"| {statistics.mean(kept):.0%} | {', '.join(f'{k:.0%}' for k in kept)} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Fill the table row by row."""
    parser = study_parser(__doc__)
    parser.add_argument("--only", nargs="*", help="rows: " + " ".join(o.folder for o in OBJECTIVES))
    parser.add_argument("--ratios", nargs="*", type=float, default=RATIOS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=150, help="of alignment")
    parser.add_argument("--rows", type=Path, help="JSON file of all rows; default: in --output")
    arguments = parser.parse_args()
    file: Path = arguments.rows or arguments.output / "rows.json"
    rows = [Row(**row) for row in json.loads(file.read_text())] if file.exists() else []
    known = {(row.ratio, row.seed, row.objective) for row in rows}
    with ray_session(lr.RayConfig(), cpus=2):
        for row in measure(arguments, known):
            rows.append(row)
            file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
            file.with_suffix(".md").write_text(as_markdown(rows))
    print(as_markdown(rows))


if __name__ == "__main__":
    main()
