"""Options of PEFT's LoRA that prevent recovery to the base's shapes."""

from __future__ import annotations

NOT_RECOVERED = {
    "use_dora": "DoRA's magnitudes depend on the norms of the pruned weights",
    "bias": "a trained bias is not a low-rank product",
    "lora_bias": "a trained bias is not a low-rank product",
    "modules_to_save": "fully trained modules have the pruned shapes",
    "trainable_token_indices": "trained embedding rows are not a low-rank product",
    "layer_replication": "the base has no replicated layers",
    "target_parameters": "the plan covers linears, not bare parameters",
    "fan_in_fan_out": "its matrices are stored transposed",
    "megatron_config": "its matrices are sharded",
    "arrow_config": "a router chooses between adapters",
    "alora_invocation_tokens": "it is active for some tokens only",
    "kasa_config": "KaSA truncates the frozen weights",
    "loftq_config": "LoftQ changes the frozen weights",
    "corda_config": "CorDA changes the frozen weights",
    "use_qalora": "QA-LoRA pools the inputs of A, and the base has more inputs",
    "use_bdlora": "BD-LoRA's matrices are block-diagonal",
}
"""Options that are not supported, with the reasons. They make the adapter more than ``alpha / r * B
A`` on single linears, or tie it to the pruned model. Scattering A and B alone would then compute
another function."""
_INITIALISATIONS = ("pissa", "olora", "loftq", "corda", "lora_ga")


def is_chosen(value: object) -> bool:
    """Return whether an option has a value other than its default, which is off."""
    return bool(value) and value != "none"


def changes_frozen_weights(initialisation: object) -> bool:
    """Return whether an initialisation removes something from the frozen weights."""
    return isinstance(initialisation, str) and initialisation.lower().startswith(_INITIALISATIONS)
