"""PEFT LoRA directories, read without loading a model: shapes, scales and checks."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from loram_ray.artifacts.tensorfile import TensorFile, require_finite
from loram_ray.errors import LoramError
from loram_ray.peft_options import NOT_RECOVERED, changes_frozen_weights, is_chosen
from loram_ray.utils.parsing import read_json
from loram_ray.utils.patterns import match_patterns

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
TEMPLATE_FILE = "chat_template.jinja"
_DEFAULT = 8  # PEFT's default for r and lora_alpha
_PREFIX = "base_model.model."
_KIND = re.compile(re.escape(_PREFIX) + r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


class Adapter:
    """A PEFT LoRA directory.

    Attributes:
        directory: Directory of the adapter.
        config: Content of ``adapter_config.json``.
        file: Open file of the adapter's tensors; close it after use.
        modules: Paths of the adapted modules, in the file's order.
    """

    def __init__(self, directory: Path | str, key: str) -> None:
        self.directory = Path(directory)
        self.config = read_adapter_config(self.directory, key)
        _refuse_other_methods(self.config, self.directory)
        self.file = TensorFile(self.directory / ADAPTER_FILE)
        try:
            sides = [split_name(name, self.directory) for name in self.file.specs]
            self.modules = list(dict.fromkeys(module for module, _ in sides))
            for module in self.modules:
                self._require_pair(module)
            require_readable(self.directory, key)
            self._alphas = self._by_pattern("alpha_pattern")
        except BaseException:
            self.close()
            raise

    def _require_pair(self, module: str) -> None:
        """Check that a module has A ``[r, in]`` and B ``[out, r]``."""
        a, b = (self.file.specs.get(tensor_name(module, side)) for side in "AB")
        if a is None or b is None:
            missing = "lora_A" if a is None else "lora_B"
            raise LoramError(f"{self.directory} lacks {missing} of {module}; train it again")
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            raise LoramError(
                f"{self.directory} has lora_A {a.shape} and lora_B {b.shape} for {module}, which "
                "have no rank in common; train it again"
            )

    def _by_pattern(self, setting: str) -> dict[str, Any]:
        """Return a setting's values by module, for the modules that one of its patterns matches."""
        patterns: dict[str, Any] = self.config.get(setting) or {}
        name = f"{self.directory / CONFIG_FILE}: {setting}"
        return {
            module: patterns[pattern]
            for module, pattern in match_patterns(list(patterns), self.modules, name).items()
        }

    def read(self, module: str, side: str) -> torch.Tensor:
        """Return A ``[r, in]`` or B ``[out, r]`` of a module.

        Raises:
            LoramError: If it contains NaN or infinity.
        """
        name = tensor_name(module, side)
        return require_finite(name, self.file.read(name), self.file.path)

    def rank(self, module: str) -> int:
        """Return the rank r of a module's A ``[r, in]`` and B ``[out, r]``."""
        return self.file.specs[tensor_name(module, "A")].shape[0]

    def scale(self, module: str) -> float:
        """Return a module's ``alpha / r``, or ``alpha / sqrt(r)`` with rsLoRA.

        Values set by patterns take precedence.
        """
        rank = self.rank(module)
        alpha = self._alphas.get(module, self.config.get("lora_alpha", _DEFAULT))
        return float(alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))

    def close(self) -> None:
        """Close the adapter's file."""
        self.file.close()

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def require_readable(directory: Path, key: str) -> None:
    """Check that PEFT can read an adapter without failing or hanging, whatever its settings.

    Args:
        directory: Directory of the adapter.
        key: Configuration key or option that named it, for messages.

    Raises:
        LoramError: If its configuration or its file of tensors is damaged, or the two disagree.
    """
    config = read_adapter_config(directory, key)
    with TensorFile(directory / ADAPTER_FILE) as file:
        modules = [match["module"] for name in file.specs if (match := _KIND.fullmatch(name))]
        path = directory / CONFIG_FILE
        for setting in ("target_modules", "exclude_modules"):
            if isinstance(config.get(setting), str):
                match_patterns([config[setting]], modules, f"{path}: {setting}")
        match_patterns(list(config.get("alpha_pattern") or {}), modules, f"{path}: alpha_pattern")
        patterns: dict[str, int] = config.get("rank_pattern") or {}
        ranks = match_patterns(list(patterns), modules, f"{path}: rank_pattern")
        for name, spec in file.specs.items():
            match = _KIND.fullmatch(name)
            if match is None or len(spec.shape) != 2:
                continue
            rank = spec.shape[0 if match["side"] == "A" else 1]
            module = match["module"]
            named = patterns[ranks[module]] if module in ranks else config.get("r", _DEFAULT)
            if named != rank:
                raise LoramError(
                    f"{path}: r of {module} must be {rank}, the rank of its tensors, got {named}; "
                    "restore the file"
                )


def own_template(directory: Path | None) -> Path | None:
    """Return the chat template an adapter was trained with, if it differs from its model's."""
    path = None if directory is None else directory / TEMPLATE_FILE
    return path if path is not None and path.is_file() else None


def copy_template(source: Path, target: Path) -> None:
    """Copy an adapter's own chat template, if it has one."""
    template = own_template(source)
    if template is not None:
        shutil.copyfile(template, target / TEMPLATE_FILE)


def tensor_name(module: str, side: str) -> str:
    """Return PEFT's name of a module's A or B."""
    return f"{_PREFIX}{module}.lora_{side}.weight"


def split_name(name: str, directory: Path) -> tuple[str, str]:
    """Return the module path and the side (A or B) of a tensor's name.

    Raises:
        LoramError: If the tensor is neither an A nor a B.
    """
    match = _KIND.fullmatch(name)
    if match is None and name.endswith(".base_layer.weight"):
        raise LoramError(
            f"{directory} holds {name}, a copy of the frozen weight that PEFT adds for lm_head; "
            "save the adapter with save_embedding_layers=False"
        )
    if match is None:
        raise LoramError(
            f"{directory} holds tensor {name}, which is no LoRA A or B of a linear; "
            "train with LoRA on linears alone"
        )
    return match["module"], match["side"]


def read_adapter_config(directory: Path, key: str) -> dict[str, Any]:
    """Return the content of an adapter's ``adapter_config.json``.

    Args:
        directory: Directory of the adapter.
        key: Configuration key that named it, for messages.

    Raises:
        LoramError: If the file is missing or not JSON, or a value has a wrong type or an absurd
            size.
    """
    from loram_ray.artifacts.model_config import AdapterConfig
    from loram_ray.utils.parsing.documents import checked

    path = directory / CONFIG_FILE
    if not os.path.lexists(path):
        raise LoramError(
            f"{key} must be a PEFT adapter directory, {directory} holds no {CONFIG_FILE}; "
            "run loram train first or give its output"
        )
    config: dict[str, Any] = read_json(path, remedy="copy it again")
    checked(AdapterConfig, config, str(path), remedy="copy it again")
    return config


def _refuse_other_methods(config: Mapping[str, Any], directory: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise LoramError(
            f"{directory} must be a LoRA adapter, its peft_type is {config.get('peft_type')}; "
            "only LoRA can be recovered"
        )
    for setting, why in NOT_RECOVERED.items():
        if is_chosen(config.get(setting)):
            raise LoramError(
                f"{directory} was trained with {setting} = {config[setting]}, which cannot be "
                f"recovered: {why}; train without it"
            )
    start = config.get("init_lora_weights")
    if changes_frozen_weights(start):
        raise LoramError(
            f"{directory} was trained with init_lora_weights = {start}, which changes the frozen "
            "weights; convert it to a plain LoRA with PEFT first"
        )
