"""What the comparisons share: text held out, a LoRA trained, recovered, merged and scored.

Everything is done by the stages that the ``loram`` command calls, each in a directory of its own,
so that a study that was cut goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from prepare_demo import write_lines

import loram_ray as lr
from loram_ray.evaluation.statistics import share_of_gain

HOLD_OUT_EVERY, HELD_OUT = 25, 24
SEQUENCE = 256


@dataclass(frozen=True)
class Training:
    """How each LoRA is trained; 8 examples of at most 256 tokens a step."""

    steps: int
    warmup_steps: int = 3
    learning_rate: float = 1e-3
    seed: int = 0


def study_parser(documentation: str) -> argparse.ArgumentParser:
    """What every comparison is asked for; its help begins with the first line of its module's."""
    parser = argparse.ArgumentParser(description=documentation.splitlines()[0])
    parser.add_argument("--inputs", type=Path, required=True, help="made by prepare_demo.py")
    parser.add_argument("--output", type=Path, required=True, help="directory of the study")
    parser.add_argument("--quick", action="store_true", help="tiny settings: does it all run?")
    return parser


class Study:
    """One directory of a study.

    Args:
        inputs: made by prepare_demo.
        output: where everything goes.
        training: of each LoRA.
        limit: examples that are scored; all by default.
    """

    def __init__(
        self, inputs: Path, output: Path, training: Training, limit: int | None = None
    ) -> None:
        self.inputs, self.output = inputs, output
        self._training, self._limit = training, limit
        output.mkdir(parents=True, exist_ok=True)
        self._split_text()

    def _split_text(self) -> None:
        """Hold some documents out of the text; the rest calibrates and aligns."""
        with open(self.inputs / "text.jsonl") as lines:
            rows = [json.loads(line) for line in lines]
        held = rows[::HOLD_OUT_EVERY][:HELD_OUT]
        kept = [row for i, row in enumerate(rows) if i % HOLD_OUT_EVERY]
        write_lines(self.output / "held_out.jsonl", iter(held))
        write_lines(self.text, iter(kept))

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
        """LoRA on the base itself, merged."""
        return self._merged(self._trained(Path(self.base), folder / "adapter"), folder)

    def _trained(self, model: Path, output: Path) -> Path:
        training = self._training
        config = lr.TrainConfig(
            model=model,
            output=output,
            data=str(self.inputs / "train.jsonl"),
            lora={"r": 8, "alpha": 16, "dropout": 0.0},
            steps=training.steps,
            batch_size=8,
            micro_batch_size=8,
            max_length=SEQUENCE,
            optimiser={
                "learning_rate": training.learning_rate,
                "warmup_steps": training.warmup_steps,
            },
            seed=training.seed,
        )
        return lr.train(config).output

    def _merged(self, adapter: Path, folder: Path) -> Path:
        merging = lr.MergeConfig(base=self.base, adapter=adapter, output=folder / "merged")
        return lr.merge(merging).output

    def text_perplexity(self, model: Path | str, folder: Path) -> float:
        """Perplexity of the held-out text."""
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
        """Perplexity of the held-out answers."""
        config = lr.EvaluateConfig(
            model=str(model),
            output=folder / "answer_scores",
            data=str(self.inputs / "test.jsonl"),
            limit=self._limit,
        )
        return lr.evaluate(config).manifest.details["answer_perplexity"]

    @staticmethod
    def gain_kept(base: float, adapted: float, full: float) -> float:
        """Of perplexities of answers: what one gains as a share of what full LoRA does."""
        return share_of_gain("answer_perplexity", base, adapted, full)
