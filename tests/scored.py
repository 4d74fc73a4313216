"""Scoring in this process, without Ray."""

from __future__ import annotations

from loram_ray.config import EvaluateConfig
from loram_ray.evaluation.scoring import Plan, Scorer


def score(config: EvaluateConfig) -> dict[str, float | int]:
    """All scores of a configuration, as the stage has them."""
    plan, scorer = Plan(config), Scorer(config)
    found = {batch.number: scorer.score(*plan.asked(batch))[0] for batch in plan.batches}
    return scorer.size() | plan.scores(found)
