"""Names and shapes of the tensors that a ``config.json`` describes.

The tensors that a model's class expects follow from its configuration and family alone, so nothing
here needs transformers, whose modelling code takes seconds to import.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loram_ray.architectures import Architecture, architecture_of
from loram_ray.artifacts.tensorfile import TensorSpec
from loram_ray.errors import LoramError
from loram_ray.models.quantisation import READABLE
from loram_ray.units import Geometry

_MOST_BLOCKS_OF_A_TENSOR = 100
"""Maximum of layers times experts per stored tensor; real models have several tensors for each."""
_RECOMPUTED = ".rotary_emb.inv_freq"
"""Suffix of the names of rotary frequencies, which old models store and Transformers computes."""

Shapes = dict[str, tuple[int, ...]]


def is_recomputed(name: str) -> bool:
    """Return whether transformers computes a stored tensor from the configuration."""
    return name.endswith(_RECOMPUTED)


def expected_shapes(config: Mapping[str, Any]) -> Shapes:
    """Return the shape of each tensor of a model on disk, by name, without a tied output head.

    Args:
        config: Content of ``config.json`` of a base, pruned, aligned or merged model. Quantised
            linears have their shapes from before quantisation.

    Raises:
        LoramError: If the family is not supported, or a size is missing or invalid.
    """
    settings = dict(config)
    family = family_in(settings)
    geometry = family.geometry(settings)
    words, hidden = _size_of_vocabulary(settings), geometry.hidden_size
    shapes: Shapes = {
        f"{family.embeddings}.weight": (words, hidden),
        f"{family.final_norm}.weight": (hidden,),
    }
    if not family.is_tied(settings):
        shapes[f"{family.output_head}.weight"] = (words, hidden)
    changed = _changed_linears(settings)
    biases = (names for key, names in family.biases if key is None or settings.get(key))
    biased = {name for names in biases for name in names}
    for layer in range(geometry.num_layers):
        for name, shape in _linears(family, geometry, settings, layer):
            path = f"{family.layers}.{layer}.{name}"
            shape = changed.pop(path, shape)
            shapes[f"{path}.weight"] = shape
            if name in biased:
                shapes[f"{path}.bias"] = shape[:1]
        for name, size in _norms(family, geometry, layer, shapes):
            shapes[f"{family.layers}.{layer}.{name}.weight"] = (size,)
    if changed:
        raise LoramError(
            "pruned_linears in the model's config.json must name linears in its layers, got "
            f"{next(iter(changed))}; restore the file"
        )
    return shapes


def require_described(
    directory: Path, config: Mapping[str, Any], stored: Mapping[str, TensorSpec], file: str
) -> None:
    """Check that weights match a configuration.

    Args:
        directory: Directory of the model, for messages.
        config: Content of ``config.json``.
        stored: Shape and dtype of each stored tensor.
        file: Name of the file with all weights, or of their index, for messages.

    Raises:
        LoramError: If they do not match; the message names the first tensor.
    """
    named = config.get("transformers_weights")
    if named not in (None, file):
        raise LoramError(
            f"transformers_weights in {directory / 'config.json'} must not be set, got "
            f"{named!r:.80}; remove it, the weights are in {file}"
        )
    _require_possible(directory, config, len(stored))
    expected = expected_shapes(config)
    quantisation = _Quantisation(directory, config)
    left = dict(stored)
    for name, shape in expected.items():
        parts = quantisation.parts(name, shape, stored)
        missing = [part for part in parts if part not in left]
        if missing:
            others = len(expected.keys() - stored.keys() - {name})
            raise _missing(directory, missing[0], parts[missing[0]], others)
        for part, size in parts.items():
            found = left.pop(part)
            if size is not None and found.shape != size:
                raise LoramError(
                    f"{directory} has {part} of shape {found.shape}, but its config.json requires "
                    f"{size}; correct config.json or download the model again"
                )
        if parts.keys() == {name} and not stored[name].dtype.is_floating_point:
            raise LoramError(
                f"{directory} has {name} in {stored[name].dtype}, but weights must be floating "
                "point; convert the model or download it again"
            )
    family = family_in(config)
    head = f"{family.output_head}.weight"
    embeddings = expected[f"{family.embeddings}.weight"]
    for name, spec in left.items():
        if name == head and spec.shape == embeddings:  # a tied model that also stores its head
            continue
        if not is_recomputed(name):
            raise LoramError(
                f"{directory} has tensor {name} {spec.shape}, but its config.json describes a "
                "model without it; correct config.json or download the model again"
            )


def _require_possible(directory: Path, config: Mapping[str, Any], stored: int) -> None:
    """Reject absurd numbers of layers and experts before listing their tensors."""
    settings = dict(config)
    geometry = family_in(settings).geometry(settings)
    blocks = geometry.num_layers * max(1, geometry.num_experts)
    if blocks > _MOST_BLOCKS_OF_A_TENSOR * max(1, stored):
        experts = f" of {geometry.num_experts:,} experts" if geometry.num_experts else ""
        raise LoramError(
            f"{directory} has {stored:,} tensors, but its config.json describes "
            f"{geometry.num_layers:,} layers{experts}; correct config.json or download the model "
            "again"
        )


def _missing(directory: Path, name: str, shape: tuple[int, ...] | None, others: int) -> LoramError:
    more = f" and {others} more" if others else ""
    size = "" if shape is None else f" {shape}"
    return LoramError(
        f"{directory} lacks tensor {name}{size}{more}, which its config.json requires; correct "
        "config.json or download the model again"
    )


def family_in(config: Mapping[str, Any]) -> Architecture:
    """Return the family of a base's or a pruned model's ``config.json``."""
    return architecture_of(str(config.get("model_type")).removeprefix("loram_"))


def _size_of_vocabulary(config: Mapping[str, Any]) -> int:
    words = config.get("vocab_size")
    if type(words) is not int or words < 1:
        raise LoramError(
            f"vocab_size in the model's config.json must be a positive integer, got {words!r:.40}; "
            "restore the file"
        )
    return words


def _changed_linears(config: Mapping[str, Any]) -> Shapes:
    """Return the shapes of the linears that pruning changed."""
    found = config.get("pruned_linears") or {}
    try:
        shapes = {name: (int(rows), int(columns)) for name, (rows, columns) in found.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise LoramError(
            "pruned_linears in the model's config.json must map names to [out, in], got "
            f"{found!r:.80}; restore the file"
        ) from error
    return dict(shapes)


def _linears(
    family: Architecture, geometry: Geometry, config: Mapping[str, Any], layer: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name inside a stock layer and the shape ``[out, in]`` of each of its linears."""
    hidden = geometry.hidden_size
    sparse = family.router is not None and _has_experts(config, layer)
    for linear in family.linears:
        if linear.per_expert and not sparse:
            continue
        size = linear.size(geometry)
        shape = (size, hidden) if linear.axis == 0 else (hidden, size)
        for expert in range(geometry.num_experts) if linear.per_expert else (0,):
            yield linear.name_of(expert), shape
    if sparse:
        assert family.router is not None
        yield family.router, (geometry.num_experts, hidden)
    elif family.router is not None:
        neurons = config.get("intermediate_size")
        yield "mlp.gate_proj", (neurons, hidden)  # type: ignore[misc]
        yield "mlp.up_proj", (neurons, hidden)  # type: ignore[misc]
        yield "mlp.down_proj", (hidden, neurons)  # type: ignore[misc]


def _has_experts(config: Mapping[str, Any], layer: int) -> bool:
    """Return whether a layer has experts (Qwen3-MoE may have layers without)."""
    step = config.get("decoder_sparse_step") or 1
    return layer not in (config.get("mlp_only_layers") or ()) and (layer + 1) % step == 0


def _norms(
    family: Architecture, geometry: Geometry, layer: int, shapes: Shapes
) -> Iterator[tuple[str, int]]:
    """Yield the name inside a layer and the size of each of its norms."""
    for name in family.hidden_norms:
        yield name, geometry.hidden_size
    for name in family.head_norms:
        yield name, geometry.head_dim
    for norm in family.norms:  # over the outputs of a linear that may be pruned
        linear = next(one for one in family.linears if one.spans == norm.spans)
        yield norm.name, shapes[f"{family.layers}.{layer}.{linear.name}.weight"][0]


class _Quantisation:
    """The quantisation settings of a configuration.

    Raises:
        LoramError: If the format is not supported.
    """

    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        self._directory = directory
        said = config.get("quantization_config")
        self._is_on = bool(said)
        said = said if isinstance(said, dict) else {}
        kind = said.get("quant_method", "bitsandbytes")
        if self._is_on and (kind != "bitsandbytes" or not said.get("load_in_4bit")):
            raise LoramError(
                f"quantization_config in {directory / 'config.json'} must be bitsandbytes with "
                f"load_in_4bit, got {kind}; use the model in full precision"
            )
        self._is_double = bool(said.get("bnb_4bit_use_double_quant"))
        self._layers = f"{family_in(config).layers}."
        self._some_whole = bool(said.get("llm_int8_skip_modules"))
        self._modules = {linear.name.rpartition(".")[2] for linear in family_in(config).linears}

    def parts(
        self, name: str, shape: tuple[int, ...], stored: Mapping[str, TensorSpec]
    ) -> dict[str, tuple[int, ...] | None]:
        """Return the stored tensors of a weight and their shapes; None accepts any shape.

        Raises:
            LoramError: If the weight is quantised but the configuration is not, or vice versa.
        """
        form = next((form for form in READABLE if form.state_of(name) in stored), None)
        if form is None:
            is_linear = name.startswith(self._layers) and len(shape) == 2
            is_linear &= name.split(".")[-2] in self._modules
            if self._is_on and is_linear and not self._some_whole and name in stored:
                raise LoramError(
                    f"{self._directory} has {name} in full precision, but quantization_config in "
                    "its config.json marks it as quantised; remove quantization_config or quantise "
                    "the model again"
                )
            return {name: shape}
        if not self._is_on:
            raise LoramError(
                f"{self._directory} has {name} quantised, but its config.json has no "
                "quantization_config; restore config.json or quantise the model again"
            )
        return form.stored_shapes(name, shape, self._is_double)
