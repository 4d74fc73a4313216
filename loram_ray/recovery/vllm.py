"""Serving of a recovered adapter with vLLM.

vLLM reads PEFT's directory (``vllm/lora/peft_helper.py`` and ``vllm/config/lora.py``, as of 2026).
It scales every module by the configuration's ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with
rsLoRA, and ignores patterns. ``--max-lora-rank`` only takes certain values, and most of its models
reject a LoRA on the output head or the embeddings.
"""

from __future__ import annotations

import math

from loram_ray.architectures import Architecture
from loram_ray.artifacts.adapter import Adapter

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that ``--max-lora-rank`` accepts."""


def vllm_options(adapter: Adapter) -> str:
    """Return the options of ``vllm serve BASE`` for an adapter that vLLM supports."""
    rank = max(adapter.rank(module) for module in adapter.modules)
    most = next(allowed for allowed in VLLM_RANKS if allowed >= rank)
    return f"--enable-lora --max-lora-rank {most}"


def why_not_vllm(adapter: Adapter, family: Architecture) -> str | None:
    """Return why vLLM would reject or misscale an adapter; None if vLLM supports it.

    Args:
        adapter: Adapter in the base's shapes.
        family: Family of the base.
    """
    outside = [m for m in (family.output_head, family.embeddings) if m in adapter.modules]
    if outside:
        return f"{outside[0]} is adapted"
    config = adapter.config
    root = config.get("use_rslora")
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if root else config["r"])
    for module in adapter.modules:
        if not math.isclose(adapter.scale(module), scale, rel_tol=1e-6):
            return (
                f"{module} is scaled by {adapter.scale(module):g}, but vLLM scales all modules "
                f"by {scale:g}"
            )
    rank = max(adapter.rank(module) for module in adapter.modules)
    if rank > VLLM_RANKS[-1]:
        return f"a rank is {rank}, and vLLM's maximum is {VLLM_RANKS[-1]}"
    return None


def serving_note(adapter: Adapter, family: Architecture) -> str:
    """Return one line on how to serve an adapter with vLLM."""
    reason = why_not_vllm(adapter, family)
    if reason is not None:
        return f"cannot be served as an adapter ({reason}); use loram merge"
    return vllm_options(adapter)
