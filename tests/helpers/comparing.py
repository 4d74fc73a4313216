"""Run files of small comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers import tiny
from loram_ray.config import RunConfig


def run_of(base: Path, folder: Path, compare: dict[str, Any], **sections: Any) -> RunConfig:
    """A run file with a comparison of one task; its inputs are written to the folder."""
    data = str(tiny.write_jsonl(folder / "data.jsonl", tiny.questions()))
    held_out = str(tiny.write_jsonl(folder / "held_out.jsonl", tiny.questions(9)))
    text = str(tiny.write_jsonl(folder / "text.jsonl", tiny.texts(80)))
    train = {"lora": {"r": 2, "dropout": 0.0}, "steps": 2, "batch_size": 4, "max_length": 64}
    align = {"corpus": {"sources": [{"path": text}], "sequence_length": 32}, "steps": 2}
    return RunConfig.model_validate(
        {
            "base": str(base),
            "output": str(folder / "run"),
            "prune": {"layers": (1, 3)},
            "train": {**train, "precision": "fp32", "cpus": 1},
            "align": {**align, "precision": "fp32", "batch_size": 2, "micro_batch_size": 2},
            "evaluate": {"precision": "fp32", "cpus_per_worker": 1},
            "compare": {"tasks": {"sums": {"data": data, "held_out": held_out}}, **compare},
            **sections,
        }
    )
