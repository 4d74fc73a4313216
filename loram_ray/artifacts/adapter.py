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

from loram_ray.artifacts.adapter_names import (
    frozen_weight,
    parse_tensor_name,
    plain_path,
    tensor_name,
)
from loram_ray.artifacts.manifest import digest_of, hash_file
from loram_ray.artifacts.tensorfile import TensorFile, require_finite
from loram_ray.errors import LoramError
from loram_ray.peft_options import NOT_RECOVERED, changes_frozen_weights, is_chosen
from loram_ray.utils.parsing import read_json
from loram_ray.utils.patterns import match_patterns

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
TEMPLATE_FILE = "chat_template.jinja"
_DEFAULT = 8  # PEFT's default for r and lora_alpha
_PICKLED_FILE = "adapter_model.bin"


class Adapter:
    """A PEFT LoRA directory.

    Attributes:
        directory: Directory of the adapter.
        config: Content of ``adapter_config.json``, with plain module paths (`plain_path`).
        file: Open file of the adapter's tensors; close it after use.
        specs: Shape and dtype of each tensor by PEFT's name, whatever name the file gives it.
        modules: Paths of the adapted modules, in the file's order.
        copies: Stored names of copies of the model's frozen weights, by the weight's name.
    """

    def __init__(self, directory: Path | str, key: str) -> None:
        self.directory = Path(directory)
        self.config = _with_plain_paths(read_adapter_config(self.directory, key))
        _refuse_other_methods(self.config, self.directory)
        self.file = open_tensors(self.directory)
        try:
            self._stored = stored_names(self.file, self.directory)
            self.specs = {name: self.file.specs[own] for name, own in self._stored.items()}
            self.copies = {
                weight: name for name in self.file.specs if (weight := frozen_weight(name))
            }
            sides = map(parse_tensor_name, self._stored)
            self.modules = list(dict.fromkeys(side[0] for side in sides if side is not None))
            if not self.modules:
                raise LoramError(
                    f"{self.directory / ADAPTER_FILE} must contain tensors named lora_A and "
                    "lora_B, but contains none; save the adapter with PEFT's save_pretrained"
                )
            for module in self.modules:
                self._require_pair(module)
            require_readable(self.directory, key)
            self._alphas = self._by_pattern("alpha_pattern")
        except BaseException:
            self.close()
            raise

    def _require_pair(self, module: str) -> None:
        """Check that a module has A ``[r, in]`` and B ``[out, r]``."""
        a, b = (self.specs.get(tensor_name(module, side)) for side in "AB")
        if a is None or b is None:
            missing = "lora_A" if a is None else "lora_B"
            raise LoramError(f"{self.directory} lacks {missing} of {module}; train it again")
        if not (a.nbytes and b.nbytes):
            raise LoramError(
                f"{self.directory} contains an empty tensor for {module}, as a trainer saves under "
                "ZeRO-3 that does not gather the weights; set "
                "stage3_gather_16bit_weights_on_model_save to true and save the adapter again"
            )
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
        return require_finite(name, self.file.read(self._stored[name]), self.file.path)

    def rank(self, module: str) -> int:
        """Return the rank r of a module's A ``[r, in]`` and B ``[out, r]``."""
        return self.specs[tensor_name(module, "A")].shape[0]

    def scale(self, module: str) -> float:
        """Return a module's ``alpha / r``, or ``alpha / sqrt(r)`` with rsLoRA.

        Values set by patterns take precedence.
        """
        rank = self.rank(module)
        alpha = self._alphas.get(module, self.config.get("lora_alpha", _DEFAULT))
        return float(alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))

    def targets(self) -> list[str] | str | None:
        """Return ``target_modules``, or the paths of all modules if it does not match them all.

        PEFT ignores tensors of modules that ``target_modules`` does not match.
        """
        named: list[str] | str | None = self.config.get("target_modules")
        if isinstance(named, str):  # an expression that `require_readable` has tried
            matches = re.compile(named).fullmatch
            return named if all(map(matches, self.modules)) else list(self.modules)
        ends = tuple(f".{name}" for name in named or ())
        return named if all(f".{m}".endswith(ends) for m in self.modules) else list(self.modules)

    def close(self) -> None:
        """Close the adapter's file."""
        self.file.close()

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_tensors(directory: Path) -> TensorFile:
    """Open the file of an adapter's tensors.

    Raises:
        LoramError: If it is missing, pickled, or damaged.
    """
    path = directory / ADAPTER_FILE
    if not os.path.lexists(path) and (directory / _PICKLED_FILE).exists():
        raise LoramError(
            f"{directory} must contain {ADAPTER_FILE}, but contains {_PICKLED_FILE}, which can run "
            "code when it is read; save the adapter with safe_serialization=True"
        )
    return TensorFile(path)


def stored_names(file: TensorFile, directory: Path) -> dict[str, str]:
    """Return the stored name of each A and B by PEFT's name, in the file's order.

    Copies of frozen weights are left out (`frozen_weight`).

    Args:
        file: File of an adapter's tensors.
        directory: Directory of the adapter, for messages.

    Raises:
        LoramError: If a tensor is neither an A or B nor such a copy, or there are several adapters.
    """
    stored: dict[str, str] = {}
    adapters: set[str] = set()
    for name in file.specs:
        parsed = parse_tensor_name(name)
        if parsed is None:
            if frozen_weight(name) is not None:
                continue
            raise LoramError(
                f"{directory} contains tensor {name}, which is not LoRA's A or B of a linear "
                "layer; train LoRA on linear layers only"
            )
        module, side, adapter = parsed
        adapters.add(adapter)
        other = stored.setdefault(tensor_name(module, side), name)
        if other != name and len(adapters) == 1:
            raise LoramError(
                f"{directory} contains lora_{side} of {module} twice, as {other} and {name}; save "
                "the adapter again"
            )
    if len(adapters) > 1:
        names = ", ".join(repr(name) for name in sorted(adapters))
        raise LoramError(
            f"{directory} must contain one adapter, but its tensors belong to {names}; save one"
            " of them"
        )
    return stored


def require_readable(directory: Path, key: str) -> None:
    """Check that PEFT can read an adapter without failing or hanging, whatever its settings.

    Args:
        directory: Directory of the adapter.
        key: Configuration key or option that named it, for messages.

    Raises:
        LoramError: If its configuration or its file of tensors is damaged, or the two disagree.
    """
    config = _with_plain_paths(read_adapter_config(directory, key))
    with open_tensors(directory) as file:
        parsed = {name: parts for name in file.specs if (parts := parse_tensor_name(name))}
        modules = [module for module, _, _ in parsed.values()]
        path = directory / CONFIG_FILE
        for setting in ("target_modules", "exclude_modules"):
            if isinstance(config.get(setting), str):
                match_patterns([config[setting]], modules, f"{path}: {setting}")
        match_patterns(list(config.get("alpha_pattern") or {}), modules, f"{path}: alpha_pattern")
        patterns: dict[str, int] = config.get("rank_pattern") or {}
        ranks = match_patterns(list(patterns), modules, f"{path}: rank_pattern")
        for name, (module, side, _) in parsed.items():
            shape = file.specs[name].shape
            if len(shape) != 2 or not all(shape):
                continue
            rank = shape[0 if side == "A" else 1]
            named = patterns[ranks[module]] if module in ranks else config.get("r", _DEFAULT)
            if named != rank:
                raise LoramError(
                    f"{path}: r of {module} must be {rank}, the rank of its tensors, got {named}; "
                    "restore the file"
                )


def content_digest(directory: Path) -> str:
    """Return the SHA-256 that identifies the content of an adapter without a manifest."""
    return digest_of([hash_file(path) for path in sorted(directory.glob("adapter_*"))])


def _with_plain_paths(config: dict[str, Any]) -> dict[str, Any]:
    """Return an adapter's configuration without wrappers' names in paths and patterns."""

    def plain(value: Any) -> Any:
        if isinstance(value, str):
            return plain_path(value)
        if isinstance(value, dict):
            return {plain_path(path): each for path, each in value.items()}
        return [plain_path(path) for path in value] if isinstance(value, list) else value

    paths = ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern")
    return {**config, **{key: plain(config[key]) for key in paths if key in config}}


def own_template(directory: Path | None) -> Path | None:
    """Return the chat template an adapter was trained with, if it differs from its model's."""
    path = None if directory is None else directory / TEMPLATE_FILE
    return path if path is not None and path.is_file() else None


def copy_template(source: Path, target: Path) -> None:
    """Copy an adapter's own chat template, if it has one."""
    template = own_template(source)
    if template is not None:
        shutil.copyfile(template, target / TEMPLATE_FILE)


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
            f"{key} must be a PEFT adapter directory, {directory} does not contain {CONFIG_FILE}; "
            "run loram train first or give its output"
        )
    config: dict[str, Any] = read_json(path, remedy="copy it again")
    checked(AdapterConfig, config, str(path), remedy="copy it again")
    return config


def _refuse_other_methods(config: Mapping[str, Any], directory: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise LoramError(
            f"{directory} must be a LoRA adapter, but its peft_type is {config.get('peft_type')}; "
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
