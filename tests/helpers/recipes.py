"""Recipes of large models, and the models' published shapes."""

from __future__ import annotations

from pathlib import Path

from transformers import LlamaConfig

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"


def llama(
    layers: int, hidden: int, neurons: int, heads: int, kv_heads: int, words: int, positions: int
) -> LlamaConfig:
    """Return a configuration as published with the model."""
    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=neurons,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=words,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
    )


# The recipe, and the shapes and parameters of the base and the pruned model, if published.
RECIPES = {
    "llama-3.1-70b": (llama(80, 8192, 28672, 64, 8, 128256, 131072), 70_553_706_496, "17.85"),
    "llama-2-70b": (llama(80, 8192, 28672, 64, 8, 32000, 4096), 68_976_648_192, "16.27"),
    "llama-2-13b": (llama(40, 5120, 13824, 40, 40, 32000, 4096), 13_015_864_320, "6.01"),
    "llama-3.1-8b": (llama(32, 4096, 14336, 32, 8, 128256, 131072), 8_030_261_248, None),
}
