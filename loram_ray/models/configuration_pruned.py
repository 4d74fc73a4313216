"""Configurations of pruned models for transformers; this file is saved beside the weights."""

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


class PrunedLlamaConfig(Pruned, LlamaConfig):
    """Configuration of a pruned Llama."""

    model_type = "loram_llama"


class PrunedMistralConfig(Pruned, MistralConfig):
    """Configuration of a pruned Mistral."""

    model_type = "loram_mistral"


class PrunedQwen2Config(Pruned, Qwen2Config):
    """Configuration of a pruned Qwen2."""

    model_type = "loram_qwen2"


class PrunedQwen3Config(Pruned, Qwen3Config):
    """Configuration of a pruned Qwen3."""

    model_type = "loram_qwen3"


class PrunedGemma2Config(Pruned, Gemma2Config):
    """Configuration of a pruned Gemma 2."""

    model_type = "loram_gemma2"


class PrunedGemma3Config(Pruned, Gemma3TextConfig):
    """Configuration of a pruned text-only Gemma 3."""

    model_type = "loram_gemma3_text"


class PrunedPhi3Config(Pruned, Phi3Config):
    """Configuration of a pruned Phi-3."""

    model_type = "loram_phi3"


class PrunedOlmo2Config(Pruned, Olmo2Config):
    """Configuration of a pruned OLMo 2."""

    model_type = "loram_olmo2"


class PrunedMixtralConfig(Pruned, MixtralConfig):
    """Configuration of a pruned Mixtral."""

    model_type = "loram_mixtral"


class PrunedQwen3MoeConfig(Pruned, Qwen3MoeConfig):
    """Configuration of a pruned Qwen3-MoE."""

    model_type = "loram_qwen3_moe"
