"""Every pruning criterion on a real model: perplexity after pruning, and after LoRAM.

    python jobs/prepare_demo.py --output runs/demo/inputs
    python jobs/compare_criteria.py --inputs runs/demo/inputs --output runs/criteria

Each criterion prunes layers 4 to 27 of SmolLM2-135M at two ratios; the pruned models are scored on
held-out text, then aligned briefly, a LoRA is trained on each and recovered, and the base with it
is scored on held-out answers. Everything is done by the stages that the ``loram`` command calls, so
a run that was cut goes on where it stopped. The table is written to ``table.md`` after every row;
``--only taylor flap`` does some criteria, ``--pruning-only`` leaves LoRAM out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prepare_demo import write_lines
from study import SEQUENCE, Study, Training, study_parser

import loram_ray as lr
from loram_ray.cluster import ray_session

LAYERS = (4, 28)
STRUCTURED_RATIOS, UNSTRUCTURED_RATIOS = (0.35, 0.65), (0.5, 0.65)
ALIGN_EVERY = 10


@dataclass(frozen=True)
class Criterion:
    """A row's pruning.

    Attributes:
        name: in the table.
        settings: of the prune stage.
        scores_of: the row whose scores it uses, or None to calibrate.
    """

    name: str
    settings: dict[str, Any]
    scores_of: Criterion | None = None

    @property
    def folder(self) -> str:
        """A name for its directories."""
        return "-".join(str(v).replace(":", "of") for v in self.settings.values())


def criteria() -> list[Criterion]:
    """All of them, by kind and ratio."""
    structured = [
        ("random", {"method": "random"}),
        ("magnitude", {"method": "magnitude"}),
        ("activation", {"method": "activation"}),
        ("FLAP", {"method": "flap"}),
        ("Taylor, first order", {"method": "taylor", "taylor": "first"}),
        ("Taylor, second order", {"method": "taylor", "taylor": "second"}),
        ("Taylor, mixed", {"method": "taylor", "taylor": "mixed"}),
    ]
    found = []
    for name, settings in structured:
        first, second = STRUCTURED_RATIOS
        calibrated = Criterion(name, {**settings, "ratio": first})
        scores = None if name == "random" else calibrated
        found += [calibrated, Criterion(name, {**settings, "ratio": second}, scores)]
        if name in ("FLAP", "Taylor, first order"):
            found += [
                Criterion(
                    f"{name}, global allocation",
                    {**settings, "ratio": ratio, "allocation": "global"},
                    scores,
                )
                for ratio in STRUCTURED_RATIOS
            ]
    found.sort(key=lambda c: c.settings["ratio"])
    masked = (("magnitude", "magnitude"), ("Wanda", "wanda"), ("SparseGPT", "sparsegpt"))
    patterns = [{"pattern": "unstructured", "ratio": ratio} for ratio in UNSTRUCTURED_RATIOS]
    for settings in (*patterns, {"pattern": "4:8"}):
        found += [Criterion(name, {"method": method, **settings}) for name, method in masked]
    return found


class CriteriaStudy(Study):
    """The stages of every row.

    Args:
        inputs: made by prepare_demo.
        output: where everything goes.
        quick: tiny settings, to see that all of it runs.
    """

    def __init__(self, inputs: Path, output: Path, quick: bool) -> None:
        super().__init__(inputs, output, Training(2 if quick else 16), 8 if quick else None)
        self._quick = quick
        with open(self.text) as lines:
            rows = [json.loads(line) for line in lines]
        write_lines(output / "alignment.jsonl", iter(rows[::ALIGN_EVERY]))

    def pruned(self, criterion: Criterion) -> Path:
        """Prune by a criterion."""
        calibration = lr.CalibrationConfig(
            sources=[{"path": str(self.text)}],
            samples=8 if self._quick else 32,
            sequence_length=SEQUENCE,
            batch_size=4,
        )
        config = lr.PruneConfig(
            base=self.base,
            output=self.folder(criterion) / "pruned",
            layers=LAYERS,
            calibration=None if criterion.scores_of else calibration,
            scores=self.folder(criterion.scores_of) / "pruned" if criterion.scores_of else None,
            **criterion.settings,
        )
        return lr.prune(config).output

    def folder(self, criterion: Criterion) -> Path:
        """Directory of a row."""
        return self.output / criterion.folder

    def aligned(self, criterion: Criterion) -> Path:
        """Align the pruned model."""
        folder = self.folder(criterion)
        config = lr.AlignConfig(
            pruned=folder / "pruned",
            output=folder / "aligned",
            corpus={
                "sources": [{"path": str(self.output / "alignment.jsonl")}],
                "sequence_length": SEQUENCE,
            },
            objective="causal_lm",
            steps=2 if self._quick else 6,
            batch_size=8,
            micro_batch_size=2,
            cpus_per_worker=2,
            optimiser={"learning_rate": 3e-4, "warmup_steps": 2},
        )
        return lr.align(config).output


def as_markdown(rows: list[dict[str, Any]], base: dict[str, float]) -> str:
    """The table."""
    lines = [
        "| pattern | ratio | criterion | parameters left | text perplexity, pruned "
        "| answer perplexity, LoRAM | gain kept |",
        "|---|---|---|---|---|---|---|",
        f"| base untouched | | | {base['parameters'] / 1e6:.1f} M | {base['text']:.2f} "
        f"| {base['answers']:.3f} | |",
    ]
    if "full" in base:
        lines.append(f"| LoRA on the full base | | | | | {base['full']:.3f} | 100% |")
    for row in rows:
        answers = f"{row['answers']:.3f}" if "answers" in row else ""
        kept = f"{row['gain_kept']:.0%}" if "gain_kept" in row else ""
        lines.append(
            f"| {row['pattern']} | {row['ratio']} | {row['name']} | {row['left'] / 1e6:.1f} M "
            f"| {row['text']:.2f} | {answers} | {kept} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Fill the table row by row."""
    parser = study_parser(__doc__)
    parser.add_argument("--only", nargs="*", help="methods, e.g. taylor flap")
    parser.add_argument("--pruning-only", action="store_true", help="leave LoRAM out")
    arguments = parser.parse_args()
    study = CriteriaStudy(arguments.inputs, arguments.output, arguments.quick)
    chosen = [c for c in criteria() if not arguments.only or c.settings["method"] in arguments.only]
    rows: list[dict[str, Any]] = []
    with ray_session(lr.RayConfig(), cpus=2):
        base: dict[str, float] = {
            "text": study.text_perplexity(study.base, arguments.output / "base"),
            "answers": study.answer_perplexity(study.base, arguments.output / "base"),
        }
        for criterion in chosen:
            output = study.pruned(criterion)
            plan = lr.PruningPlan.load(output)
            details = json.loads((output / "manifest.json").read_text())["details"]
            base["parameters"] = details["base_parameters"]
            rows.append(
                {
                    "criterion": criterion,
                    "name": criterion.name,
                    "pattern": plan.pattern,
                    "ratio": plan.ratio,
                    "left": details.get("nonzero_parameters", details["parameters"]),
                    "text": study.text_perplexity(output, study.folder(criterion)),
                }
            )
            (arguments.output / "table.md").write_text(as_markdown(rows, base))
        if not arguments.pruning_only:
            full = arguments.output / "full"
            base["full"] = study.answer_perplexity(study.full_lora(full), full)
            first = (STRUCTURED_RATIOS[0], UNSTRUCTURED_RATIOS[0])
            for row in sorted(rows, key=lambda row: row["ratio"] not in first):
                folder = study.folder(row["criterion"])
                merged = study.adapted(study.aligned(row["criterion"]), folder)
                row["answers"] = study.answer_perplexity(merged, folder)
                row["gain_kept"] = study.gain_kept(base["answers"], row["answers"], base["full"])
                (arguments.output / "table.md").write_text(as_markdown(rows, base))
    print((arguments.output / "table.md").read_text())


if __name__ == "__main__":
    main()
