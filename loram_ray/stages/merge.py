"""The merge stage: merges an adapter or a dense delta into its base, in full precision."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from loram_ray.architectures import Architecture
from loram_ray.artifacts.adapter import copy_template, own_template
from loram_ray.artifacts.manifest import (
    read_manifest,
    require_stage,
    write_json,
)
from loram_ray.artifacts.stage_directory import (
    StageDirectory,
    StageResult,
    require_space,
    run_stage,
)
from loram_ray.artifacts.tensorfile import Checkpoint, CheckpointWriter, TensorSpec
from loram_ray.config import MergeConfig, RayConfig
from loram_ray.corpus.templates import end_of_answer
from loram_ray.errors import LoramError
from loram_ray.models.base import BaseModel
from loram_ray.models.files import write_model_files
from loram_ray.models.tokenizer import load_tokenizer
from loram_ray.plan import PruningPlan
from loram_ray.recovery.copies import require_unchanged
from loram_ray.recovery.deltas import Change, LoraChange, open_change
from loram_ray.recovery.parity import parity_of
from loram_ray.runtime.progress import Reporter, say
from loram_ray.utils.parsing import read_json

GENERATION_FILE = "generation_config.json"
_EXACT = 1e-3
_MORE_THAN_ROUNDING = 10
_FELT, _LOST = 0.1, 0.5
"""Limits on the error of the merged logits, relative to the adapter's change of the logits: float32
error, multiple of the weights' rounding error, error to report, error to reject."""


def merge(config: MergeConfig, ray_config: RayConfig | None = None) -> StageResult:
    """Merge a LoRA or a delta into its base, tensor by tensor; the sum is computed in float32.

    This stage runs in the calling process; ``ray_config`` is unused.

    Raises:
        LoramError: The adapter is for another base, or the base is pruned, quantised or damaged.
    """
    base = BaseModel.open(config.base, "merge.base")
    family = base.family
    base.require_full(" and merging would round")
    with base, closing(open_change(config.adapter, "merge.adapter")) as change:
        identity = base.fingerprint
        _require_base(change, identity, config.base)
        if isinstance(change, LoraChange):
            require_unchanged(change.adapter, base.checkpoint, family)
        targets = {_stored_name(m, base.checkpoint, family): m for m in change.modules}
        for name, module in targets.items():
            _require_shapes(change, module, base.checkpoint.specs[name])

        ends = _learnt_ends(base, change.directory)

        def write(target: StageDirectory) -> None:
            rounded = _write(target, base, change, targets, config.max_shard_bytes)
            if ends is not None:
                write_json(target.path / GENERATION_FILE, ends)
            if config.parity:
                _require_parity(target, base.directory, change, family, rounded)

        return run_stage(
            config.output,
            "merge",
            settings={
                "max_shard_bytes": config.max_shard_bytes,
                **({} if ends is None else {"eos_token_id": ends["eos_token_id"]}),
            },
            parents={"base": identity, "adapter": change.digest},
            base_fingerprint=identity,
            write=write,
            reads=(config.base, config.adapter),
        )


def _learnt_ends(base: BaseModel, adapter: Path) -> dict[str, Any] | None:
    """Return generation settings that end at the token learnt from answers, if the base's do not.

    Training on conversations teaches the token with which the chat template closes an answer. If
    the base's settings do not end generation at this token, the merged model generates past it.

    Returns:
        The content of the settings file, or None if the base's own settings suffice.
    """
    template = own_template(adapter)
    try:
        tokenizer = load_tokenizer(base.directory, template, "merge.adapter")
    except LoramError:
        return None  # the tokenizer of a base without one comes from another directory
    if not tokenizer.chat_template:
        return None
    path = base.directory / GENERATION_FILE
    settings: dict[str, Any] = read_json(path) if path.exists() else {}
    if not settings:  # transformers then uses those of config.json
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        settings = {k: base.config[k] for k in names if base.config.get(k) is not None}
    listed = settings.get("eos_token_id")
    ends = [*listed] if isinstance(listed, list) else [] if listed is None else [listed]
    eos_id = end_of_answer(tokenizer, ends)
    if eos_id is None or eos_id in ends:
        return None
    return {**settings, "eos_token_id": [*ends, eos_id]}


def _require_base(change: Change, identity: str, base: str) -> None:
    """Raise an error for an adapter of another base, or one that was not recovered."""
    manifest = read_manifest(change.directory)
    if manifest is None:
        return
    require_stage(change.directory, ("recover", "train"), "merge.adapter")
    if PruningPlan.is_in(change.directory):
        raise LoramError(
            f"merge.adapter must be for the base, but {change.directory} is for a pruned model; "
            "run loram recover first"
        )
    if manifest.base_fingerprint != identity:
        raise LoramError(
            "merge.base must be the base that was pruned, fingerprint "
            f"{manifest.base_fingerprint[:12]}, but {base} has {identity[:12]}; use the base of "
            "the adapter"
        )


def _stored_name(module: str, checkpoint: Checkpoint, family: Architecture) -> str:
    """Return the name of the tensor that a module's delta is added to, the embedding if tied."""
    name = family.weight_name(module, checkpoint.location)
    if name is None:
        raise LoramError(
            f"merge.adapter adapts {module}, which the base does not have; check the adapter"
        )
    return name


def _require_shapes(change: Change, module: str, spec: TensorSpec) -> None:
    rows, columns = change.shape(module)
    if (rows, columns) != spec.shape:
        raise LoramError(
            f"merge.adapter must have the base's shapes, but {module} is {rows} x {columns} in the "
            f"adapter and {' x '.join(map(str, spec.shape))} in the base; run loram recover first, "
            "or use the adapter's base"
        )


def _write(
    target: StageDirectory,
    base: BaseModel,
    change: Change,
    targets: dict[str, str],
    max_shard_bytes: int,
) -> float:
    """Write the model; return the largest relative rounding error of a weight's change."""
    checkpoint, family = base.checkpoint, base.family
    specs, config = checkpoint.specs, dict(base.config)
    head, embeddings = f"{family.output_head}.weight", f"{family.embeddings}.weight"
    untied = targets.get(embeddings) == family.output_head
    if untied:  # the changed head can no longer share the embedding's tensor
        specs[head] = specs[embeddings]
        targets = {head if name == embeddings else name: m for name, m in targets.items()}
    if head in targets:  # also if a tied base stores the same tensor twice
        config["tie_word_embeddings"] = False
    nbytes = sum(spec.nbytes for spec in specs.values())
    require_space(target.path, nbytes)
    write_model_files(checkpoint.directory, target.path, config, plan=None)
    copy_template(change.directory, target.path)
    rounded = 0.0
    with (
        Reporter("merge", total=nbytes, unit="B") as reporter,
        CheckpointWriter(target.path, specs, max_shard_bytes) as writer,
    ):
        for name, spec in specs.items():
            tensor = checkpoint.read(embeddings if untied and name == head else name)
            module = targets.get(name)
            if module is not None:
                exact = change.added_to(tensor.float(), module)
                rounded = max(rounded, _share_rounded(tensor, exact))
                tensor = exact.to(tensor.dtype)
            writer.write(name, tensor)
            reporter.advance(spec.nbytes)
    target.hashes.update(writer.hashes)
    target.details.update(merged_modules=len(targets), bytes=nbytes)
    return rounded


def _share_rounded(weight: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the norm of a changed weight's rounding error, relative to the norm of the change."""
    change = torch.linalg.vector_norm(exact - weight.float())
    rounding = torch.linalg.vector_norm(exact - exact.to(weight.dtype).float())
    return float(rounding / change) if change else 0.0


def _require_parity(
    target: StageDirectory, base: Path, change: Change, family: Architecture, rounded: float
) -> None:
    """Raise an error if the merged model differs from base and adapter; report notable rounding."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = parity_of(base, change, target.path, family, device)
    if found.modules < len(change.modules):
        other = len(change.modules) - found.modules
        say(
            "merge",
            f"parity was not checked: {other} changed modules are not linears of a decoder layer",
        )
        return
    share = found.relative_error
    measured = (
        f"the merged model's logits differ by {found.error:.3g} from those of the base with the "
        f"adapter, which differ by {found.effect:.3g} from the base's"
    )
    if share > max(_EXACT, _MORE_THAN_ROUNDING * rounded) and not found.is_float_error:
        raise LoramError(
            f"merge: {measured}, which rounding does not explain; check memory and disk, and "
            "report it with the adapter's adapter_config.json"
        )
    if share > _LOST:
        raise LoramError(
            f"merge: {measured}; the change is too small for the weights' dtype: use the adapter "
            "unmerged, or train it longer"
        )
    if share > _FELT:
        say("merge", f"{measured}: rounding to the weights' dtype has a noticeable effect")
    target.details.update(
        parity_relative_error=share, parity_kl=found.kl, parity_agreement=found.agreement
    )
