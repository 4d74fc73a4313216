"""Model directories: location, family, and files other than weights.

Nothing here needs transformers, whose modelling code takes seconds to import.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loram_ray.architectures import Architecture, architecture_of
from loram_ray.artifacts.manifest import read_model_config
from loram_ray.errors import LoramError, first_line
from loram_ray.plan import PruningPlan

NORM_MEAN = "kept"
"""How norms over pruned features compute their mean in newly pruned models: over the kept features
only. On OLMo 2 this was better than over all features in 18 of 18 prunings (ratio 0.625: perplexity
9.90 instead of 10.72).
"""

_CONFIGURATION_FILE = Path(__file__).with_name("configuration_pruned.py")
_MODELING_FILE = Path(__file__).with_name("modeling_pruned.py")
_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


def resolve_base(base: str | Path, key: str) -> Path:
    """Return the directory of a base model, downloading a hub id once into the hub's cache.

    Args:
        base: Directory or hub id of the model.
        key: Configuration key that named it, for messages.

    Raises:
        LoramError: If it is neither a directory nor a model on the hub that this machine can read.
    """
    path = Path(base)
    if path.is_dir():
        return path
    text = str(base)
    if path.is_absolute() or text.startswith(".") or text.count("/") != 1:
        raise LoramError(
            f"{key} must be a model directory or a Hub id, but {base} is neither; check the path "
            "or the id"
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.txt", "*.jinja", "tokenizer*", "LICENSE*"]
    try:
        return Path(snapshot_download(text, allow_patterns=patterns))
    except Exception as error:
        raise LoramError(
            f"{key} {base} is not a local directory and could not be downloaded from the Hub "
            f"({first_line(error)}); check the name, the network and HF_TOKEN"
        ) from error


def family_of(directory: Path | str) -> Architecture:
    """Return the family of a base, pruned or aligned model directory.

    Raises:
        LoramError: If ``config.json`` is missing or the family is not supported.
    """
    return family_described(read_model_config(directory), directory)


def family_described(config: Mapping[str, Any], directory: Path | str) -> Architecture:
    """Return the family that a model's ``config.json`` describes.

    Args:
        config: Content of ``config.json``.
        directory: Directory of the model, for messages.

    Raises:
        LoramError: If the family is not supported, or the model is not text-only.
    """
    text = config.get("text_config")
    if isinstance(text, dict):
        raise LoramError(
            f"the base must be a text model, but {directory} is a {config.get('model_type')} "
            f"around a {text.get('model_type')}; save its language model separately and use that"
        )
    return architecture_of(stock_model_type(config.get("model_type")))


def stock_model_type(model_type: str | None) -> str | None:
    """Return the stock model type: ``llama`` for both ``llama`` and ``loram_llama``."""
    return model_type.removeprefix("loram_") if model_type else model_type


def pruned_config(
    base_config: dict[str, Any], plan: PruningPlan, linear_shapes: dict[str, tuple[int, int]]
) -> dict[str, Any]:
    """Return the configuration of a pruned model.

    It is the base's configuration with the changed shapes and the location of the pruned classes.

    Args:
        base_config: Content of the base's ``config.json``.
        plan: Plan of the pruned model.
        linear_shapes: Shape ``[out, in]`` of each linear that pruning changed, by path.
    """
    family = plan.architecture
    norms = {"pruned_norm_mean": NORM_MEAN} if family.norms and linear_shapes else {}
    return {
        **base_config,
        "model_type": f"loram_{plan.model_type}",
        "architectures": [family.pruned_model],
        "auto_map": {
            "AutoConfig": f"{_CONFIGURATION_FILE.stem}.{family.pruned_config}",
            "AutoModelForCausalLM": f"{_MODELING_FILE.stem}.{family.pruned_model}",
        },
        "pruned_linears": {name: list(shape) for name, shape in linear_shapes.items()},
        "masked_linears": list(plan.masks.shapes) if plan.masks else [],
        **norms,
    }


def write_model_files(
    source: Path, target: Path, config: dict[str, Any], plan: PruningPlan | None
) -> None:
    """Write a model directory except its weights: config, tokenizer, plan and modelling code.

    Args:
        source: Model directory whose tokenizer files are copied.
        target: Directory to write to.
        config: Content of ``config.json``.
        plan: Plan of a pruned model, or None for a model of stock shapes.
    """
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for pattern in _COMPANIONS:
        for path in sorted(p for p in source.glob(pattern) if p.is_file()):
            copy = target / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
    if plan is not None:
        plan.save(target)
        for file in (_CONFIGURATION_FILE, _MODELING_FILE):
            shutil.copyfile(file, target / file.name)
