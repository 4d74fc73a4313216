"""Describe which linears of a decoder layer are pruned together, for each model family.

This is the only module that knows module names. To add a family, add one `Architecture` to
`ARCHITECTURES` and the two classes it names to `configuration_pruned` and `modeling_pruned`;
nothing else changes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from loram_ray.errors import LoramError
from loram_ray.units import KV_HEAD, NEURON, QUERY_GROUP, UNITS, Geometry, Span, Unit

_EXPERT = "{expert}"


@dataclass(frozen=True)
class CoupledLinear:
    """Linear of a decoder layer with one pruned dimension.

    Attributes:
        name: Path of the module inside the decoder layer, as on disk; ``{expert}`` stands for an
            expert's index.
        axis: Pruned dimension of its weight ``[out, in]``: 0 for rows, 1 for columns.
        spans: Units along that dimension, in order; a fused projection has several spans.
    """

    name: str
    axis: int
    spans: tuple[Span, ...]

    @property
    def per_expert(self) -> bool:
        """Whether each expert has its own copy, with its own kept neurons."""
        return _EXPERT in self.name

    def size(self, geometry: Geometry) -> int:
        """Return the size of the pruned dimension in the base."""
        return sum(span.size(geometry) for span in self.spans)

    def name_of(self, expert: int | None) -> str:
        """Return the path inside the decoder layer, for one expert if it is per expert."""
        return self.name.replace(_EXPERT, str(expert))


@dataclass(frozen=True)
class Architecture:
    """Description of a model family for pruning.

    Attributes:
        model_type: ``model_type`` of the family's stock configuration.
        pruned_config: Name of the family's configuration class in `configuration_pruned`.
        pruned_model: Name of the family's model class in `modeling_pruned`.
        layers: Path of the list of decoder layers in the causal LM.
        linears: Coupled linears of a decoder layer.
        norms: Norm weights ``[features]`` of a decoder layer along a pruned dimension, described
            like linears with pruned rows.
        intermediate_size: Key of the (expert's) intermediate size in the stock configuration.
        output_head: Path of the linear from hidden states to the vocabulary.
        embeddings: Path of the input embedding, whose weight a tied `output_head` shares.
        final_norm: Path of the norm between the last layer and `output_head`.
        hidden_norms: Norms of a decoder layer over the hidden size.
        head_norms: Norms of a decoder layer over one head, shared by all heads.
        biases: Linears of a decoder layer with a bias, and the key of the stock configuration that
            enables it; None means always.
        router: Linear that routes tokens to experts in a mixture of experts.
        defaults: Defaults of the stock configuration for keys missing from ``config.json``.
        renamed: Parts of parameter names in the stock model, and their form on disk.
    """

    model_type: str
    pruned_config: str
    pruned_model: str
    linears: tuple[CoupledLinear, ...]
    norms: tuple[CoupledLinear, ...] = ()
    intermediate_size: str = "intermediate_size"
    layers: str = "model.layers"
    output_head: str = "lm_head"
    embeddings: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    hidden_norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    head_norms: tuple[str, ...] = ()
    biases: tuple[tuple[str | None, tuple[str, ...]], ...] = ()
    router: str | None = None
    defaults: tuple[tuple[str, Any], ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()

    def geometry(self, config: dict[str, Any]) -> Geometry:
        """Read the sizes from a stock configuration (``config.json``).

        Raises:
            LoramError: If a size is missing or invalid.
        """
        config = {**dict(self.defaults), **config}
        heads, hidden = _size(config, "num_attention_heads"), _size(config, "hidden_size")
        kv_heads = _size(config, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise LoramError(
                "num_key_value_heads in the model's config.json must divide num_attention_heads = "
                f"{heads}, got {kv_heads}; restore the file"
            )
        return Geometry(
            num_layers=_size(config, "num_hidden_layers"),
            hidden_size=hidden,
            intermediate_size=_size(config, self.intermediate_size),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=_size(config, "head_dim", hidden // heads),
            num_experts=self._num_experts(config),
        )

    def _num_experts(self, config: dict[str, Any]) -> int:
        if self.router is None:
            return 0
        # Transformers writes the former; published models use either.
        key = "num_local_experts" if "num_local_experts" in config else "num_experts"
        return _size(config, key)

    @property
    def units(self) -> tuple[Unit, ...]:
        """The kinds of units that pruning selects in a layer."""
        used = {span.unit for linear in self.linears for span in linear.spans}
        return tuple(unit for unit in UNITS if unit in used)

    def is_tied(self, config: dict[str, Any]) -> bool:
        """Whether a ``config.json`` ties the output head to the embeddings."""
        return bool({**dict(self.defaults), **config}.get("tie_word_embeddings", False))

    def modules(
        self, layer: int, geometry: Geometry
    ) -> list[tuple[str, CoupledLinear, int | None]]:
        """Return the path on disk and the expert, or None, of each coupled linear of a layer."""
        found: list[tuple[str, CoupledLinear, int | None]] = []
        for linear in self.linears:
            experts = range(geometry.num_experts) if linear.per_expert else (None,)
            for expert in experts:
                path = f"{self.layers}.{layer}.{linear.name_of(expert)}"
                found.append((path, linear, expert))
        return found

    def locate(self, module: str) -> tuple[int, CoupledLinear, int | None] | None:
        """Return layer, coupled linear or norm, and expert or None of a module's full path.

        The path may be the stock model's or the one on disk. Returns None for a module that is not
        coupled.
        """
        path = self.name_on_disk(module)
        match = re.fullmatch(re.escape(self.layers) + r"\.(\d+)\.(.+)", path)
        if match is None:
            return None
        for linear in (*self.linears, *self.norms):
            inside = _pattern(linear.name).fullmatch(match[2])
            if inside is not None:
                return int(match[1]), linear, int(inside[1]) if linear.per_expert else None
        return None

    def name_on_disk(self, name: str) -> str:
        """Return the name on disk of a module or parameter of the stock model."""
        for running, stored in self.renamed:
            name = name.replace(running, stored)
        return name

    def weight_name(self, module: str, stored: Collection[str]) -> str | None:
        """Return the name of a module's stored weight; a tied output head uses the embedding's.

        Returns None if neither is stored.
        """
        for name in (module, self.embeddings if module == self.output_head else module):
            if f"{name}.weight" in stored:
                return f"{name}.weight"
        return None

    def target_names(self) -> tuple[str, ...]:
        """Return the short names of the coupled linears, as in PEFT's ``target_modules``."""
        return tuple(linear.name.rsplit(".", 1)[-1] for linear in self.linears)


def _size(config: dict[str, Any], key: str, default: int | None = None) -> int:
    """Return a size from a configuration; null and missing keys give the default, if any."""
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise LoramError(f"the model's config.json lacks {key}; restore the file")
    if type(value) is not int or value < 1:
        raise LoramError(
            f"{key} in the model's config.json must be a positive integer, got {value!r:.40}; "
            "restore the file"
        )
    return value


@functools.cache
def _pattern(name: str) -> re.Pattern[str]:
    """Return a pattern for a coupled module's path, with the expert's index as a group."""
    return re.compile(re.escape(name).replace(re.escape(_EXPERT), r"(\d+)"))


_ATTENTION = (
    CoupledLinear("self_attn.q_proj", 0, (QUERY_GROUP,)),
    CoupledLinear("self_attn.k_proj", 0, (KV_HEAD,)),
    CoupledLinear("self_attn.v_proj", 0, (KV_HEAD,)),
    CoupledLinear("self_attn.o_proj", 1, (QUERY_GROUP,)),
)
_FUSED_ATTENTION = (
    CoupledLinear("self_attn.qkv_proj", 0, (QUERY_GROUP, KV_HEAD, KV_HEAD)),
    CoupledLinear("self_attn.o_proj", 1, (QUERY_GROUP,)),
)
_FUSED_MLP = (
    CoupledLinear("mlp.gate_up_proj", 0, (NEURON, NEURON)),
    CoupledLinear("mlp.down_proj", 1, (NEURON,)),
)


def _gated_mlp(
    path: str = "mlp", gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> tuple[CoupledLinear, ...]:
    return (
        CoupledLinear(f"{path}.{gate}", 0, (NEURON,)),
        CoupledLinear(f"{path}.{up}", 0, (NEURON,)),
        CoupledLinear(f"{path}.{down}", 1, (NEURON,)),
    )


_DENSE = (*_ATTENTION, *_gated_mlp())
_ATTENTION_BIAS = (
    "attention_bias",
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
)
_MLP_BIAS = ("mlp_bias", ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"))
_QUERY_AND_KEY_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_AROUND_BOTH = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_GEMMA = (("num_key_value_heads", 4), ("head_dim", 256), ("tie_word_embeddings", True))

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        "llama",
        "PrunedLlamaConfig",
        "PrunedLlamaForCausalLM",
        _DENSE,
        biases=(_ATTENTION_BIAS, _MLP_BIAS),
    ),
    Architecture(
        "mistral",
        "PrunedMistralConfig",
        "PrunedMistralForCausalLM",
        _DENSE,
        defaults=(("num_key_value_heads", 8),),
    ),
    Architecture(
        "qwen2",
        "PrunedQwen2Config",
        "PrunedQwen2ForCausalLM",
        _DENSE,
        biases=((None, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),),
        defaults=(("num_key_value_heads", 32),),
    ),
    Architecture(
        "qwen3",
        "PrunedQwen3Config",
        "PrunedQwen3ForCausalLM",
        _DENSE,
        head_norms=_QUERY_AND_KEY_NORMS,
        biases=(_ATTENTION_BIAS,),
        defaults=(("num_key_value_heads", 32), ("head_dim", 128)),
    ),
    Architecture(
        "gemma2",
        "PrunedGemma2Config",
        "PrunedGemma2ForCausalLM",
        _DENSE,
        hidden_norms=_AROUND_BOTH,
        biases=(_ATTENTION_BIAS,),
        defaults=_GEMMA,
    ),
    Architecture(
        "gemma3_text",
        "PrunedGemma3Config",
        "PrunedGemma3ForCausalLM",
        _DENSE,
        hidden_norms=_AROUND_BOTH,
        head_norms=_QUERY_AND_KEY_NORMS,
        biases=(_ATTENTION_BIAS,),
        defaults=_GEMMA,
    ),
    Architecture(
        "phi3", "PrunedPhi3Config", "PrunedPhi3ForCausalLM", (*_FUSED_ATTENTION, *_FUSED_MLP)
    ),
    Architecture(
        "olmo2",
        "PrunedOlmo2Config",
        "PrunedOlmo2ForCausalLM",
        _DENSE,
        norms=(
            CoupledLinear("self_attn.q_norm", 0, (QUERY_GROUP,)),
            CoupledLinear("self_attn.k_norm", 0, (KV_HEAD,)),
        ),
        hidden_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        biases=(_ATTENTION_BIAS,),
    ),
    Architecture(
        "mixtral",
        "PrunedMixtralConfig",
        "PrunedMixtralForCausalLM",
        (*_ATTENTION, *_gated_mlp(f"block_sparse_moe.experts.{_EXPERT}", "w1", "w3", "w2")),
        router="block_sparse_moe.gate",
        defaults=(("num_key_value_heads", 8),),
        renamed=((".mlp.", ".block_sparse_moe."),),
    ),
    Architecture(
        "qwen3_moe",
        "PrunedQwen3MoeConfig",
        "PrunedQwen3MoeForCausalLM",
        (*_ATTENTION, *_gated_mlp(f"mlp.experts.{_EXPERT}")),
        intermediate_size="moe_intermediate_size",
        head_norms=_QUERY_AND_KEY_NORMS,
        biases=(_ATTENTION_BIAS,),
        router="mlp.gate",
        defaults=(("num_key_value_heads", 4),),
    ),
)


def architecture_of(model_type: str | None) -> Architecture:
    """Return the description of a family.

    Raises:
        LoramError: If the family is not supported; the message lists the supported ones.
    """
    for architecture in ARCHITECTURES:
        if architecture.model_type == model_type:
            return architecture
    supported = ", ".join(a.model_type for a in ARCHITECTURES)
    raise LoramError(
        f"the base's model_type must be one of [{supported}], got {model_type!r}; use a base of a "
        "supported family"
    )
