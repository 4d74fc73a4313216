"""The training objectives of alignment.

To add an objective, add an `Objective` to `OBJECTIVES` and its loss: to ``DIVERGENCES`` of
`distillation` if it learns from the base's predictions, or else to `alignment.objective`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Objective:
    """A training objective, without its loss.

    Attributes:
        name: Value of ``align.objective``.
        help: What it does, after its name in the help.
        card: Its name in the card of an aligned model.
        distils: Whether it learns from the base's predictions.
    """

    name: str
    help: str
    card: str
    distils: bool = False


OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        Objective(
            "distillation",
            "matches the base's predictions on the corpus",
            "distilled from the base",
            distils=True,
        ),
        Objective(
            "causal_lm",
            "predicts the next token of the corpus, as in the paper",
            "causal-LM loss",
        ),
    )
}
"""All objectives by name."""
