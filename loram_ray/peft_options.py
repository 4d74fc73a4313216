"""Options of PEFT's LoRA that prevent recovery to the base's shapes."""

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
"""Options and the reasons why they are not supported. Either the adapter is more than
``alpha / r * B A`` on single linears, or it belongs to the pruned model. In both cases, A and B in
other places would compute another function."""
_INITIALISATIONS = ("pissa", "olora", "loftq", "corda", "lora_ga")


def is_chosen(value: object) -> bool:
    """Return whether an option has a value other than its default, which is off."""
    return bool(value) and value != "none"


def changes_frozen_weights(initialisation: object) -> bool:
    """Return whether an initialisation removes something from the frozen weights."""
    return isinstance(initialisation, str) and initialisation.lower().startswith(_INITIALISATIONS)
