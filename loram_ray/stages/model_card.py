"""README.md of a model to train on: its origin, its alignment and how to train on it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import yaml

from loram_ray.artifacts.manifest import Manifest
from loram_ray.config import AlignConfig
from loram_ray.config.publish import is_repo
from loram_ray.corpus.sources import SourceInfo
from loram_ray.errors import LoramError
from loram_ray.evaluation.uncertainty import perplexity_of
from loram_ray.models.quantisation import Quantisation
from loram_ray.objectives import OBJECTIVES
from loram_ray.plan import PruningPlan
from loram_ray.runtime.progress import HELD_OUT
from loram_ray.runtime.results import markdown_table
from loram_ray.utils.parsing import parse_yaml
from loram_ray.utils.printing import markdown

CARD_FILE = "README.md"
SIZES = ("base_parameters", "parameters", "base_bytes", "bytes")
"""Entries of a pruned or aligned model's manifest that the card lists."""
_USE = "## Use"


def model_card(
    config: AlignConfig,
    plan: PruningPlan,
    pruned: Manifest,
    sources: Sequence[SourceInfo],
    first: dict[str, Any],
    last: dict[str, Any],
    steps: int,
) -> str:
    """Return an aligned model's card in the hub's format: YAML, then Markdown.

    Args:
        config: Configuration of the alignment.
        plan: Pruning plan.
        pruned: Manifest of the pruned model.
        sources: Sources of the corpus.
        first: Metrics before the first step, if there is held-out text.
        last: Metrics of the last step.
        steps: Number of completed optimiser steps.
    """
    rows = {
        **_origin(config.base, plan, pruned),
        "alignment": f"{_objective(config)}; {steps:,} steps, "
        f"{steps * config.batch_size * config.corpus.sequence_length:,} tokens",
        "learning rate": f"{config.optimiser.learning_rate:g}, {config.optimiser.schedule}, "
        f"{config.optimiser.warmup_steps} warm-up steps",
        "final loss": f"{last['loss']:.4g}",
    }
    head = ("source", "share", "documents", "tokens", "held-out perplexity, pruned", "aligned")
    corpus = [
        (
            source.name,
            f"{source.share:.1%}",
            f"{source.documents:,}",
            f"{source.tokens:,}",
            _perplexity(first.get(HELD_OUT + source.name)),
            _perplexity(last.get(HELD_OUT + source.name)),
        )
        for source in sources
    ]
    sections = ["## Corpus", markdown_table(head, corpus)]
    name, kind = config.output.name, "pruned and aligned"
    return _card(name, kind, config.base, plan, rows, sections)


def pruned_card(base: str | None, plan: PruningPlan, pruned: Manifest, name: str) -> str:
    """Return the card of a model that is pruned but not aligned.

    Args:
        base: Base model; it is named only if it is a hub id.
        plan: Pruning plan.
        pruned: Manifest of the pruned model.
        name: Name of the pruned model's directory.
    """
    return _card(name, "pruned", base, plan, _origin(base, plan, pruned), [])


def quantized_card(card: str, name: str, details: dict[str, Any], form: Quantisation) -> str:
    """Return the card of a quantised model, based on the original model's card.

    Args:
        card: Card of the model before quantisation.
        name: Name of the quantised model's directory.
        details: Details of the quantised model's manifest.
        form: Format of the quantised weights.
    """
    head, body = _split_head(card)
    head["tags"] = [*head.get("tags", []), *form.tags]
    if "base_model" in head:
        head["base_model_relation"] = "quantized"
    saved = details["bytes_before"] / details["bytes"]
    section = (
        f"## Quantisation\n\n{details['quantized_tensors']:,} linears "
        f"({details['quantized_parameters']:,} of {details['parameters']:,} parameters) are in "
        f"{form.description}; embeddings, output head and norms are unchanged. Storage: "
        f"{details['bytes']:,} bytes, {saved:.2f} times fewer than before "
        f"({details['bytes_before']:,}). Transformers loads the model directly if bitsandbytes is "
        "installed.\n\n"
    )
    title, _, rest = body.partition("\n")
    if title.startswith("# "):
        body = f"# {markdown(name)}\n{rest}"
    before, use, after = body.partition(_USE)
    return f"{_yaml(head)}{before}{section}{use}{after}"


def _origin(base: str | None, plan: PruningPlan, pruned: Manifest) -> dict[str, str]:
    """Return the table rows on the base and the pruning."""
    sizes = pruned.details
    named = "" if base is None else f"{hub_id(base) or 'a local model'}, "
    return {
        "base": f"{named}fingerprint `{plan.base_fingerprint[:12]}`",
        "pruning": f"{plan.method}, {plan.pattern}, ratio {plan.ratio}, layers "
        f"{plan.layer_range[0]} to {plan.layer_range[1] - 1}, seed {plan.seed}",
        "parameters": f"{sizes['parameters']:,} of {sizes['base_parameters']:,} "
        f"({sizes['base_parameters'] / sizes['parameters']:.2f} times fewer)",
        "bytes": f"{sizes['bytes']:,} of {sizes['base_bytes']:,}",
    }


def _card(
    name: str,
    kind: str,
    base: str | None,
    plan: PruningPlan,
    rows: dict[str, str],
    sections: list[str],
) -> str:
    named = hub_id(base)
    run = f"--set base={named or 'BASE'} --set output=run"
    head: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["loram", "pruned", plan.method],
        **({"base_model": named, "base_model_relation": "finetune"} if named else {}),
    }
    lines = [
        f"{_yaml(head)}# {markdown(name)}",
        f"A {kind} language model for training LoRA adapters with "
        "[LoRAM](https://arxiv.org/abs/2502.13533). An adapter trained on it is *recovered* to "
        "the shapes of the base and used with the base, which training never loads.",
        "| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in rows.items()),
        *sections,
        _USE,
        "```sh\npip install loram-ray\n"
        f"loram train {run} --set train.model=DIRECTORY --set train.data=examples.jsonl\n"
        f"loram recover {run} --set recover.form=adapter\n```",
        "`run/adapter/` is a standard PEFT adapter for the base. `pruning_plan.safetensors` lists "
        "the parts that were kept; `manifest.json` records the full lineage.",
    ]
    return "\n\n".join(lines) + "\n"


def _yaml(head: dict[str, Any]) -> str:
    """Return the YAML front matter of a card."""
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n"


def _split_head(card: str) -> tuple[dict[str, Any], str]:
    """Split a card into YAML and text; cards of other tools may lack YAML or a list of tags."""
    before, _, rest = card.partition("---\n")
    written, end, body = rest.partition("---\n")
    if before.strip() or not end:
        return {}, card
    head = parse_yaml(written, f"the YAML of {CARD_FILE}")
    if not isinstance(head, dict) or not isinstance(head.get("tags", []), list):
        raise LoramError(
            f"{CARD_FILE} must begin with YAML between lines of ---, with tags as a list; correct "
            "it or remove it"
        )
    return head, body.lstrip("\n")


def hub_id(base: str | None) -> str | None:
    """Return the base if it is a hub id; local paths must not appear in a card."""
    return base if base is not None and is_repo(base) and not os.path.exists(base) else None


def _objective(config: AlignConfig) -> str:
    named = OBJECTIVES[config.objective].card
    if not config.distils:
        return named
    distillation = config.distillation
    kept = "" if distillation.targets == "live" else f" (top {distillation.top_k} tokens)"
    return f"{named}{kept}, temperature {distillation.temperature:g}"


def _perplexity(nll: float | None) -> str:
    return "" if nll is None else f"{perplexity_of(nll):,.2f}"
