"""What serves a recovered adapter, and how.

vLLM reads PEFT's directory (``vllm/lora/peft_helper.py`` and ``vllm/config/lora.py``, as they stand
in 2026): it scales every module by the configuration's ``lora_alpha / r``, or by its root with
rsLoRA, and knows no patterns; ``--max-lora-rank`` takes some numbers only; and most of its models
refuse a LoRA on the output head or the embeddings.
"""

from __future__ import annotations

import math

from loram_ray.architectures import Architecture
from loram_ray.artifacts.adapter import Adapter

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` may be."""


def vllm_options(adapter: Adapter) -> str:
    """Options of ``vllm serve BASE`` for an adapter that it takes."""
    rank = max(adapter.rank(module) for module in adapter.modules)
    most = next(allowed for allowed in VLLM_RANKS if allowed >= rank)
    return f"--enable-lora --max-lora-rank {most}"


def why_not_vllm(adapter: Adapter, family: Architecture) -> str | None:
    """Why vLLM would not take an adapter, or would scale it otherwise; None where it does.

    Args:
        adapter: of the base's shapes.
        family: of the base.
    """
    outside = [m for m in (family.output_head, family.embeddings) if m in adapter.modules]
    if outside:
        return f"{outside[0]} is adapted"
    config = adapter.config
    root = config.get("use_rslora")
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if root else config["r"])
    for module in adapter.modules:
        if not math.isclose(adapter.scale(module), scale, rel_tol=1e-6):
            return f"{module} is scaled by {adapter.scale(module):g}, vLLM scales all by {scale:g}"
    rank = max(adapter.rank(module) for module in adapter.modules)
    if rank > VLLM_RANKS[-1]:
        return f"a rank is {rank}, its largest {VLLM_RANKS[-1]}"
    return None


def serving_note(adapter: Adapter, family: Architecture) -> str:
    """One line on serving an adapter by vLLM."""
    reason = why_not_vllm(adapter, family)
    if reason is not None:
        return f"not as an adapter ({reason}); loram merge makes a model that it serves"
    return vllm_options(adapter)
