"""Which linears of a decoder layer are pruned together, per model family.

This is the only place that knows module names. Another family joins by adding one `Architecture`
to `ARCHITECTURES` and the two classes it names to `configuration_pruned` and `modeling_pruned`;
nothing else changes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from loram_ray.errors import LoramError


class Unit(StrEnum):
    """What one kept index stands for along a pruned dimension."""

    QUERY_GROUP = "query_group"
    """The ``g = num_heads / num_kv_heads`` query heads of one KV head: ``g * head_dim`` indices."""
    KV_HEAD = "kv_head"
    """One key or value head: ``head_dim`` indices."""
    NEURON = "neuron"
    """One intermediate neuron of the MLP: one index."""


@dataclass(frozen=True)
class Geometry:
    """The sizes of a decoder that pruning needs."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    def width(self, unit: Unit) -> int:
        """Consecutive indices that one unit covers."""
        return {
            Unit.QUERY_GROUP: self.group_size * self.head_dim,
            Unit.KV_HEAD: self.head_dim,
            Unit.NEURON: 1,
        }[unit]

    def count(self, unit: Unit) -> int:
        """Units of this kind in one layer."""
        return self.intermediate_size if unit is Unit.NEURON else self.num_kv_heads


@dataclass(frozen=True)
class CoupledLinear:
    """A linear of a decoder layer with one pruned dimension.

    Attributes:
        name: path of the module inside the decoder layer.
        axis: pruned dimension of its weight ``[out, in]``: 0 for rows, 1 for columns.
        sections: the units along that dimension, in order; a fused projection has several.
    """

    name: str
    axis: int
    sections: tuple[Unit, ...]


@dataclass(frozen=True)
class Architecture:
    """What pruning knows of a model family.

    Attributes:
        model_type: the ``model_type`` of the family's stock configuration.
        pruned_config: name of the family's configuration class in `configuration_pruned`.
        pruned_model: name of the family's model class in `modeling_pruned`.
        layers: path of the list of decoder layers in the causal-LM model.
        linears: the coupled linears of a decoder layer.
        output_head: path of the linear from hidden states to the vocabulary.
        embeddings: path of the input embedding, whose weight a tied `output_head` shares.
    """

    model_type: str
    pruned_config: str
    pruned_model: str
    linears: tuple[CoupledLinear, ...]
    layers: str = "model.layers"
    output_head: str = "lm_head"
    embeddings: str = "model.embed_tokens"

    def geometry(self, config: dict[str, Any]) -> Geometry:
        """Read the sizes from a stock configuration's dictionary (``config.json``)."""
        try:
            heads, hidden = config["num_attention_heads"], config["hidden_size"]
            return Geometry(
                num_layers=config["num_hidden_layers"],
                hidden_size=hidden,
                intermediate_size=config["intermediate_size"],
                num_heads=heads,
                num_kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or hidden // heads,
            )
        except KeyError as error:
            raise LoramError(f"the model's config.json lacks {error}; restore the file") from error

    def locate(self, module: str) -> tuple[int, CoupledLinear] | None:
        """Return the layer index and the coupled linear of a module's full path, or None."""
        match = re.fullmatch(re.escape(self.layers) + r"\.(\d+)\.(.+)", module)
        if match is None:
            return None
        for linear in self.linears:
            if linear.name == match[2]:
                return int(match[1]), linear
        return None

    def target_names(self) -> tuple[str, ...]:
        """Short names of the coupled linears, as PEFT's ``target_modules`` takes them."""
        return tuple(linear.name.rsplit(".", 1)[-1] for linear in self.linears)


_GATED_MLP_AND_GROUPED_ATTENTION = (
    CoupledLinear("self_attn.q_proj", 0, (Unit.QUERY_GROUP,)),
    CoupledLinear("self_attn.k_proj", 0, (Unit.KV_HEAD,)),
    CoupledLinear("self_attn.v_proj", 0, (Unit.KV_HEAD,)),
    CoupledLinear("self_attn.o_proj", 1, (Unit.QUERY_GROUP,)),
    CoupledLinear("mlp.gate_proj", 0, (Unit.NEURON,)),
    CoupledLinear("mlp.up_proj", 0, (Unit.NEURON,)),
    CoupledLinear("mlp.down_proj", 1, (Unit.NEURON,)),
)

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        "llama",
        pruned_config="PrunedLlamaConfig",
        pruned_model="PrunedLlamaForCausalLM",
        linears=_GATED_MLP_AND_GROUPED_ATTENTION,
    ),
)


def architecture_of(model_type: str | None) -> Architecture:
    """Return the family's description.

    Raises:
        LoramError: the family is not supported; the message lists those that are.
    """
    for architecture in ARCHITECTURES:
        if architecture.model_type == model_type:
            return architecture
    supported = ", ".join(a.model_type for a in ARCHITECTURES)
    raise LoramError(
        f"the base's model_type must be one of [{supported}], got {model_type!r}; "
        "choose a base of a supported family"
    )
