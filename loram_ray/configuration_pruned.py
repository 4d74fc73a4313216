"""Configurations of pruned models for transformers; this file is saved beside the weights."""

from transformers.models.llama.configuration_llama import LlamaConfig


class PrunedLlamaConfig(LlamaConfig):
    """A Llama configuration with the shapes of the linears that pruning changed.

    Attributes:
        pruned_linears: ``{module path: [out_features, in_features]}``.
        masked_linears: paths of linears whose zero weights stay zero in training.
    """

    model_type = "loram_llama"
    pruned_linears: dict[str, list[int]] | None = None
    masked_linears: list[str] | None = None
