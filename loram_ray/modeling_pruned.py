"""Pruned causal language models for transformers; this file is saved beside the weights.

It needs transformers, torch and ``configuration_pruned.py`` alone, so that a pruned model directory
loads with ``AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)`` where
loram_ray is not installed. A pruned model is its family's stock model with some linears of other
shapes: attention reshapes by ``head_dim`` and whole GQA groups are pruned, so no forward pass
changes.
"""

from torch import nn
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from .configuration_pruned import PrunedLlamaConfig


class PrunedLlamaForCausalLM(LlamaForCausalLM):
    """Llama with per-layer numbers of attention heads and intermediate neurons."""

    config_class = PrunedLlamaConfig

    def __init__(self, config: PrunedLlamaConfig) -> None:
        """Build the stock model and replace the pruned linears."""
        super().__init__(config)
        replace_linears(self, config.pruned_linears or {})


def replace_linears(model: nn.Module, shapes: dict[str, list[int]]) -> None:
    """Replace linears by uninitialised ones of shape ``[out_features, in_features]``."""
    for path, (out_features, in_features) in shapes.items():
        parent, _, name = path.rpartition(".")
        stock = model.get_submodule(path)
        resized = nn.Linear(
            in_features,
            out_features,
            bias=stock.bias is not None,
            device=stock.weight.device,
            dtype=stock.weight.dtype,
        )
        setattr(model.get_submodule(parent), name, resized)
