"""Options of PEFT's LoRA under which an adapter cannot be recovered to the base's shapes."""

from __future__ import annotations

NOT_RECOVERED = {
    "use_dora": "DoRA's magnitudes belong to the pruned weights' norms",
    "bias": "a trained bias is no low-rank product",
    "lora_bias": "a trained bias is no low-rank product",
    "modules_to_save": "whole trained modules would replace pruned ones",
    "trainable_token_indices": "trained embedding rows are no low-rank product",
    "layer_replication": "the base has no replicated layers",
    "target_parameters": "bare parameters have no rows and columns in the plan",
    "fan_in_fan_out": "its weights are stored transposed",
    "megatron_config": "its weights are split",
    "arrow_config": "a router chooses between adapters",
    "alora_invocation_tokens": "it is active on some tokens only",
    "kasa_config": "KaSA truncates the frozen weights",
    "loftq_config": "LoftQ changes the frozen weights",
    "corda_config": "CorDA changes the frozen weights",
    "use_qalora": "QA-LoRA pools the inputs of A, which the base has more of",
    "use_bdlora": "BD-LoRA's matrices are block-diagonal",
}
"""Options that make an adapter more than ``alpha / r * B A`` on single linears, or that belong to
the pruned model, and the reasons: A and B in other places would be another function."""
_INITIALISATIONS = ("pissa", "olora", "loftq", "corda", "lora_ga")


def is_chosen(value: object) -> bool:
    """Return whether an option has a value other than its default, off."""
    return bool(value) and value != "none"


def changes_frozen_weights(initialisation: object) -> bool:
    """Return whether an initialisation takes something out of the frozen weights."""
    return isinstance(initialisation, str) and initialisation.lower().startswith(_INITIALISATIONS)
