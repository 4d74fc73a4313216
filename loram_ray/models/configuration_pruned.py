"""Configurations of pruned models for transformers; this file is saved beside the weights."""

from typing import Any

from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.olmo2.configuration_olmo2 import Olmo2Config
from transformers.models.phi3.configuration_phi3 import Phi3Config
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig


class Pruned:
    """Settings that pruned models add to their family's stock configuration.

    Attributes:
        pruned_linears: Shapes of the linears that pruning changed, ``{module path: [out_features,
            in_features]}``.
        masked_linears: Paths of the linears whose zero weights stay zero in training.
        pruned_norm_mean: Denominator of the mean square in norms over pruned features: ``kept``
            counts the kept features; None counts all features of the base, as if the pruned ones
            were zero.
    """

    pruned_linears: dict[str, list[int]] | None = None
    masked_linears: list[str] | None = None
    pruned_norm_mean: str | None = None


def _pruned(name: str, stock: Any) -> Any:
    """Return the configuration class of a family's pruned models.

    Args:
        name: Name of the class, as saved directories have it in their ``auto_map``.
        stock: The family's stock configuration class.
    """
    settings = {
        "model_type": f"loram_{stock.model_type}",
        "__doc__": f"`{stock.__name__}` of a pruned model.",
    }
    return type(name, (Pruned, stock), settings)


PrunedLlamaConfig = _pruned("PrunedLlamaConfig", LlamaConfig)
PrunedMistralConfig = _pruned("PrunedMistralConfig", MistralConfig)
PrunedQwen2Config = _pruned("PrunedQwen2Config", Qwen2Config)
PrunedQwen3Config = _pruned("PrunedQwen3Config", Qwen3Config)
PrunedGemma2Config = _pruned("PrunedGemma2Config", Gemma2Config)
PrunedGemma3Config = _pruned("PrunedGemma3Config", Gemma3TextConfig)
PrunedPhi3Config = _pruned("PrunedPhi3Config", Phi3Config)
PrunedOlmo2Config = _pruned("PrunedOlmo2Config", Olmo2Config)
PrunedMixtralConfig = _pruned("PrunedMixtralConfig", MixtralConfig)
PrunedQwen3MoeConfig = _pruned("PrunedQwen3MoeConfig", Qwen3MoeConfig)
