"""What the benchmarks of alignment begin with: a base, what is left of it, and text."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
RATIO, QUICK_DOCUMENTS = 0.65, 400


@dataclass(frozen=True)
class Inputs:
    """Directories and a file."""

    base: Path
    pruned: Path
    text: Path


def write_inputs(folder: Path, quick: bool, ratio: float = RATIO) -> Inputs:
    """SmolLM2-135M pruned and real text or, quickly, a tiny random model; what is there stays."""
    import loram_ray as lr
    from helpers import tiny
    from loram_ray import demo

    folder.mkdir(parents=True, exist_ok=True)
    inputs = Inputs(folder / "base", folder / "pruned", folder / "text.jsonl")
    if not inputs.base.exists():
        if quick:
            tiny.write_base(inputs.base, layers=8)
            tiny.write_jsonl(inputs.text, tiny.texts(QUICK_DOCUMENTS))
        else:
            demo.write_base(inputs.base)
            demo.write_text(inputs.text)
    lr.prune(lr.PruneConfig(base=str(inputs.base), output=inputs.pruned, ratio=ratio))
    return inputs


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Lines of an aligned model's metrics."""
    from loram_ray.runtime.progress import METRICS_FILE

    return [json.loads(line) for line in (directory / METRICS_FILE).read_text().splitlines()]
