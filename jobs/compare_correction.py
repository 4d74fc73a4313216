"""The LoRA correction on a real model: the base with the adapter, with and without it.

    python jobs/prepare_demo.py --output runs/demo/inputs
    python jobs/compare_correction.py --inputs runs/demo/inputs --output runs/corrections

LoRAM-Rand of SmolLM2-135M, layers 4 to 27, at one or more ratios, aligned by an objective of
`compare_alignment.py` and put in NF4, or not. On each model one LoRA is trained, recovered with
every lambda and without a correction, and the base with it is scored on held-out answers.

Cut, in parts and with other seeds, it goes on as `compare_alignment.py` does: ``--rows FILE`` keeps
what was measured, and only what is missing is measured. ``--seeds 0 1 2`` is the study.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from compare_alignment import LAYERS, OBJECTIVES, aligned, steps_of
from study import Study, Training, study_parser

import loram_ray as lr
from loram_ray.cluster import ray_session

FORMS = ("nf4", "whole")


@dataclass(frozen=True)
class Row:
    """A measurement.

    Attributes:
        ratio: of the pruning.
        seed: of pruning, data order and LoRA.
        objective: the folder of one of `compare_alignment.OBJECTIVES`.
        form: ``nf4``, or ``whole`` for a model that is not quantised.
        limit: the correction's lambda; 0 is no correction.
        answers: perplexity of the base with the recovered LoRA on held-out answers.
        gain_kept: what that is of the gain of a LoRA on the base itself.
        norm: of the correction, relative to what was learnt.
    """

    ratio: float
    seed: int
    objective: str
    form: str
    limit: float
    answers: float
    gain_kept: float
    norm: float


Cell = tuple[float, int, str, str, float]


def cell(row: Row) -> Cell:
    """What a row is a measurement of."""
    return row.ratio, row.seed, row.objective, row.form, row.limit


def measure(arguments: argparse.Namespace, known: Collection[Cell]) -> Iterator[Row]:
    """Yield the rows that are not known, seed by seed."""
    limits = [0.0, *arguments.lambdas]
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
            for form in arguments.forms:
                cells = [(ratio, seed, arguments.objective, form, limit) for limit in limits]
                missing = [found for found in cells if found not in known]
                if not missing:
                    continue
                folder = root / f"{ratio}" / arguments.objective
                model = small_model(study, arguments, ratio, seed, form, folder)
                for *_, limit in missing:
                    inner = folder / form / f"lambda-{limit:g}"
                    correction = {"correction": True, "correction_lambda": limit} if limit else {}
                    merged = study.adapted(model, folder / form, inner, **correction)
                    answers = study.answer_perplexity(merged, inner)
                    manifest = json.loads((inner / "recovered" / "manifest.json").read_text())
                    base, full = ends()
                    yield Row(
                        ratio,
                        seed,
                        arguments.objective,
                        form,
                        limit,
                        answers,
                        study.gain_kept(base, answers, full),
                        manifest["details"].get("correction_norm", 0.0),
                    )


def small_model(
    study: Study, arguments: argparse.Namespace, ratio: float, seed: int, form: str, folder: Path
) -> Path:
    """Prune and align, and quantise where the form is NF4."""
    pruned = lr.prune(
        lr.PruneConfig(
            base=study.base,
            output=folder.parent / "pruned",
            ratio=ratio,
            layers=LAYERS,
            seed=seed,
        )
    )
    objective = next(o for o in OBJECTIVES if o.folder == arguments.objective)
    steps = steps_of(objective, pruned.manifest.details, arguments.steps)
    model = aligned(study, objective, pruned.output, folder, steps, seed)
    if form == "whole":
        return model
    return lr.quantize(lr.QuantizeConfig(model=model, output=folder / "quantized")).output


def as_markdown(rows: list[Row]) -> str:
    """The table: means over the seeds, and each seed's share of the gain."""
    names = {objective.folder: objective.name for objective in OBJECTIVES}
    lines = [
        "| ratio | alignment | model | lambda | correction, relative | answer perplexity "
        "| gain kept | by seed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[float, str, str, float], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.ratio, row.objective, row.form, row.limit)):
        groups.setdefault((row.ratio, row.objective, row.form, row.limit), []).append(row)
    for (ratio, objective, form, limit), found in groups.items():
        kept = [row.gain_kept for row in sorted(found, key=lambda row: row.seed)]
        lines.append(
            f"| {ratio} | {names[objective]} | {form} | {f'{limit:g}' if limit else 'off'} "
            f"| {statistics.mean(row.norm for row in found):.1%} "
            f"| {statistics.mean(row.answers for row in found):.3f} "
            f"| {statistics.mean(kept):.1%} | {', '.join(f'{k:.1%}' for k in kept)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Fill the table row by row."""
    parser = study_parser(__doc__)
    parser.add_argument("--ratios", nargs="*", type=float, default=[0.65])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=150, help="of alignment")
    parser.add_argument("--lambdas", nargs="*", type=float, default=[3.0], help="besides none")
    parser.add_argument("--forms", nargs="*", choices=FORMS, default=["nf4"])
    parser.add_argument("--objective", choices=[o.folder for o in OBJECTIVES], default="causal")
    parser.add_argument("--rows", type=Path, help="JSON file of all rows; default: in --output")
    arguments = parser.parse_args()
    file: Path = arguments.rows or arguments.output / "rows.json"
    rows = [Row(**row) for row in json.loads(file.read_text())] if file.exists() else []
    with ray_session(lr.RayConfig(), cpus=2):
        for row in measure(arguments, {cell(row) for row in rows}):
            rows.append(row)
            file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
            file.with_suffix(".md").write_text(as_markdown(rows))
    print(as_markdown(rows))


if __name__ == "__main__":
    main()
