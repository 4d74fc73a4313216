"""Scoring in this process, without Ray."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from loram_ray.config import EvaluateConfig
from loram_ray.evaluation.scoring import Plan, Scorer


def score(config: EvaluateConfig) -> dict[str, float | int]:
    """Return all scores of a configuration, as the stage computes them."""
    plan, scorer = Plan(config), Scorer(config)
    found = {batch.number: scorer.score(*plan.asked(batch))[0] for batch in plan.batches}
    return scorer.size() | plan.scores(found)


@torch.no_grad()
def naive_nll(model: LlamaForCausalLM, ids: list[int], first: int) -> float:
    """Return the NLL of ``ids[first:]`` in nats: one forward pass per token, float64 softmax."""
    total = 0.0
    for position in range(first, len(ids)):
        logits = model(torch.tensor([ids[:position]])).logits[0, -1].double()
        total -= float(torch.log_softmax(logits, dim=-1)[ids[position]])
    return total


def evaluation(model: Path, folder: Path, **settings: object) -> dict[str, float | int]:
    """Score a model directory as the actor does, without Ray."""
    config = EvaluateConfig.model_validate(
        {"model": str(model), "output": folder / "out", "precision": "fp32", **settings}
    )
    return score(config)
