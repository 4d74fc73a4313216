"""Configurations and shapes of synthetic Llamas."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Llama:
    """Sizes of a Llama."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int = 8192

    def config(self, layers: int) -> dict[str, Any]:
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 4096,
        }

    def linears(self) -> dict[str, tuple[int, int]]:
        """Shapes ``[out, in]`` of the linears of a layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (queries, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, queries),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def shapes(self, layers: int) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors, by name."""
        norms = {"input_layernorm": (self.hidden,), "post_attention_layernorm": (self.hidden,)}
        return {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden),
            **{
                f"model.layers.{layer}.{name}.weight": shape
                for layer in range(layers)
                for name, shape in {**self.linears(), **norms}.items()
            },
            "model.norm.weight": (self.hidden,),
            "lm_head.weight": (self.vocabulary, self.hidden),
        }

    def start(self, directory: Path, layers: int) -> None:
        """Make a directory with the configuration."""
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(self.config(layers)))
