"""Every pruning criterion on a real model: perplexity after pruning, and after LoRAM.

    python jobs/prepare_demo.py --output runs/demo/inputs
    python tests/benchmarks/criteria.py --inputs runs/demo/inputs --output runs/criteria

Each criterion prunes layers 4 to 27 of SmolLM2-135M at two ratios. The pruned models are scored on
held-out text and then briefly aligned. A LoRA is trained on each and recovered, and the base with
this LoRA is scored on held-out answers. All work is done by the stages of the ``loram`` command, so
an interrupted run resumes where it stopped. The table is written to ``table.md`` after every row.
``--only taylor flap`` restricts the criteria, and ``--pruning-only`` leaves LoRAM out.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import loram_ray as lr
from loram_ray.demo import write_lines
from loram_ray.evaluation.uncertainty import share_of_gain
from loram_ray.runtime.cluster import ray_session

SEQUENCE = 256
HOLD_OUT_EVERY, HELD_OUT = 25, 24
LAYERS = (4, 28)
STRUCTURED_RATIOS, UNSTRUCTURED_RATIOS = (0.35, 0.65), (0.5, 0.65)
ALIGN_EVERY = 10


@dataclass(frozen=True)
class Criterion:
    """Pruning of a row.

    Attributes:
        name: Name in the table.
        settings: Settings of the prune stage.
        scores_of: Row whose scores are reused, or None to calibrate.
    """

    name: str
    settings: dict[str, Any]
    scores_of: Criterion | None = None

    @property
    def folder(self) -> str:
        """Name of the row's directories."""
        return "-".join(str(v).replace(":", "of") for v in self.settings.values())


def criteria() -> list[Criterion]:
    """Return all criteria, by kind and ratio."""
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


class Study:
    """The stages of every row.

    Args:
        inputs: Directory made by prepare_demo.
        output: Directory to write everything to.
        quick: Whether to use tiny settings, to check that everything runs.
    """

    def __init__(self, inputs: Path, output: Path, quick: bool) -> None:
        self.inputs, self.output = inputs, output
        self._quick = quick
        output.mkdir(parents=True, exist_ok=True)
        with open(inputs / "text.jsonl") as lines:
            rows = [json.loads(line) for line in lines]
        kept = [row for i, row in enumerate(rows) if i % HOLD_OUT_EVERY]
        write_lines(output / "held_out.jsonl", iter(rows[::HOLD_OUT_EVERY][:HELD_OUT]))
        write_lines(self.text, iter(kept))
        write_lines(output / "alignment.jsonl", iter(kept[::ALIGN_EVERY]))

    def pruned(self, criterion: Criterion) -> Path:
        """Prune with a criterion."""
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
        """Return the directory of a row."""
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

    @property
    def base(self) -> str:
        """The base model."""
        return str(self.inputs / "base")

    @property
    def text(self) -> Path:
        """Documents that were not held out."""
        return self.output / "text.jsonl"

    def adapted(self, model: Path, folder: Path) -> Path:
        """Train a LoRA on a pruned or aligned model, recover and merge; return the merged model."""
        trained = self._trained(model, folder / "adapter_pruned")
        masked = lr.PruningPlan.load(trained).masks is not None
        recovery = lr.RecoverConfig(
            adapter=trained,
            base=self.base,
            output=folder / "recovered",
            form="delta" if masked else "adapter",
            correction=False,
        )
        return self._merged(lr.recover(recovery).output, folder)

    def full_lora(self, folder: Path) -> Path:
        """Train a LoRA on the base itself, and return the merged model."""
        return self._merged(self._trained(Path(self.base), folder / "adapter"), folder)

    def _trained(self, model: Path, output: Path) -> Path:
        config = lr.TrainConfig(
            model=model,
            output=output,
            data=str(self.inputs / "train.jsonl"),
            lora={"r": 8, "alpha": 16, "dropout": 0.0},
            steps=2 if self._quick else 16,
            batch_size=8,
            micro_batch_size=8,
            max_length=SEQUENCE,
            optimiser={"learning_rate": 1e-3, "warmup_steps": 3},
        )
        return lr.train(config).output

    def _merged(self, adapter: Path, folder: Path) -> Path:
        merging = lr.MergeConfig(base=self.base, adapter=adapter, output=folder / "merged")
        return lr.merge(merging).output

    def text_perplexity(self, model: Path | str, folder: Path) -> float:
        """Return the perplexity of the held-out text."""
        config = lr.EvaluateConfig(
            model=str(model),
            output=folder / "text_scores",
            text={
                "sources": [{"path": str(self.output / "held_out.jsonl")}],
                "sequence_length": SEQUENCE,
            },
        )
        return lr.evaluate(config).manifest.details["text_perplexity"]

    def answer_perplexity(self, model: Path | str, folder: Path) -> float:
        """Return the perplexity of the held-out answers."""
        config = lr.EvaluateConfig(
            model=str(model),
            output=folder / "answer_scores",
            data=str(self.inputs / "test.jsonl"),
            limit=8 if self._quick else None,
        )
        return lr.evaluate(config).manifest.details["answer_perplexity"]

    @staticmethod
    def gain_kept(base: float, adapted: float, full: float) -> float:
        """Return a gain in answer perplexity as a share of full LoRA's gain."""
        return share_of_gain("answer_perplexity", base, adapted, full)


def as_markdown(rows: list[dict[str, Any]], base: dict[str, float]) -> str:
    """Return the table as Markdown."""
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inputs", type=Path, required=True, help="made by prepare_demo.py")
    parser.add_argument("--output", type=Path, required=True, help="directory of the study")
    parser.add_argument("--quick", action="store_true", help="tiny settings: does it all run?")
    parser.add_argument("--only", nargs="*", help="methods, e.g. taylor flap")
    parser.add_argument("--pruning-only", action="store_true", help="leave LoRAM out")
    arguments = parser.parse_args()
    study = Study(arguments.inputs, arguments.output, arguments.quick)
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
