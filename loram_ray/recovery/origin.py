"""Where an adapter comes from: `loram train`, or any other trainer of PEFT LoRAs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loram_ray.artifacts.adapter import CONFIG_FILE, content_digest, read_adapter_config
from loram_ray.artifacts.manifest import read_manifest, require_stage
from loram_ray.config import RecoverConfig
from loram_ray.errors import LoramError
from loram_ray.models.base import BaseModel
from loram_ray.plan import PLAN_FILE, PruningPlan

_NOT_RECORDED = ("data", "training settings", "precision or quantisation of the model in training")
"""What an adapter of another trainer does not record."""


@dataclass(frozen=True)
class Origin:
    """What is known about the training of an adapter.

    Attributes:
        plan: Plan of the pruned model that the adapter was trained on.
        digest: Digest of the adapter's content.
        model: Digest of the pruned model.
        model_stage: Stage that wrote the pruned model, or None if it is unknown.
        directory: Directory of the pruned model; None if it was neither needed nor opened.
        elsewhere: Whether another trainer than `loram train` trained the adapter.
        details: What the manifest of the recovered adapter records about the training.
    """

    plan: PruningPlan
    digest: str
    model: str
    model_stage: str | None
    directory: Path | None = None
    elsewhere: bool = False
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def masked(self) -> bool:
        """Whether the adapter was trained under masks, which only `loram train` applies."""
        return self.plan.masks is not None and not self.elsewhere


def origin_of(config: RecoverConfig) -> Origin:
    """Return what is known about the training of the adapter to recover.

    The manifest and the plan that `loram train` writes beside an adapter are checked against its
    files. An adapter without a manifest was trained elsewhere: its plan is that of the model in
    ``config.model``, or of the model that its ``adapter_config.json`` names.

    Raises:
        LoramError: If the adapter or the pruned model is missing or damaged, or the model is not
            pruned.
    """
    manifest = read_manifest(config.adapter)
    if manifest is None and not PruningPlan.is_in(config.adapter):
        return _of_another_trainer(config)
    if manifest is None:
        raise LoramError(
            f"recover.adapter {config.adapter} contains {PLAN_FILE} but no "
            "manifest.json; copy the whole directory again"
        )
    manifest = require_stage(config.adapter, ("train",), "recover.adapter")
    return Origin(
        plan=PruningPlan.load(config.adapter),
        digest=manifest.digest,
        model=manifest.parents.get("model", "unknown"),
        model_stage=manifest.details.get("model_stage"),
    )


def _of_another_trainer(config: RecoverConfig) -> Origin:
    named = read_adapter_config(config.adapter, "recover.adapter").get("base_model_name_or_path")
    place = config.model or named
    if not place:
        raise LoramError(
            f"recover.model must name the pruned model that {config.adapter} was trained on, as "
            f"its {CONFIG_FILE} names none; add it"
        )
    key = "recover.model" if config.model else f"base_model_name_or_path of {config.adapter}"
    try:
        model = BaseModel.open(place, key)
    except LoramError as error:
        if config.model:
            raise
        raise LoramError(
            f"recover.model must name the pruned model that {config.adapter} was trained on, as "
            f"its {CONFIG_FILE} names {named}, which is not a model on this machine; add it"
        ) from error
    plan = PruningPlan.load_if_any(model.directory)
    if plan is None:
        raise LoramError(
            f"{key} must be a pruned model, but {place} does not contain {PLAN_FILE}; set "
            "recover.model to the pruned model (an adapter trained on the base needs no recovery)"
        )
    digest, _ = model.identify()
    manifest = read_manifest(model.directory)
    return Origin(
        plan=plan,
        digest=content_digest(config.adapter),
        model=digest,
        model_stage=None if manifest is None else manifest.stage,
        directory=model.directory,
        elsewhere=True,
        details={
            "trained": "elsewhere",
            "model_named": named,
            "model_used": str(place),
            "not_recorded": list(_NOT_RECORDED),
        },
    )
