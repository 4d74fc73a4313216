"""Notes on serving, compared with a loader that scales as vLLM does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import loram_ray as lr
from helpers.adapters import LINEARS, train_randomly, with_random_adapter
from loram_ray.architectures import architecture_of
from loram_ray.artifacts.adapter import ADAPTER_FILE, Adapter
from loram_ray.models.loading import load_model
from loram_ray.recovery.vllm import VLLM_RANKS, serving_note, vllm_options, why_not_vllm

LLAMA = architecture_of("llama")


def saved(base: Path, folder: Path, **settings: Any) -> tuple[Path, peft.PeftModel]:
    adapted = with_random_adapter(load_model(base, "fp32"), **settings)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder, adapted


def as_vllm_adds(directory: Path, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Each module's change by the rule of vLLM's loader, which knows one rank and one alpha."""
    tensors = load_file(directory / ADAPTER_FILE)
    root = math.sqrt(config["r"]) if config["use_rslora"] else config["r"]
    found = {}
    for name in tensors:
        if name.endswith("lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")]
            found[name.removesuffix(".lora_A.weight")] = (
                config["lora_alpha"] / root * (b @ tensors[name])
            )
    return found


@pytest.mark.parametrize(
    ("settings", "taken"),
    [
        ({}, True),
        ({"r": 6, "use_rslora": True}, True),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4}}, True),  # the same scale
        ({"rank_pattern": {"q_proj": 2}}, False),
        ({"alpha_pattern": {"down_proj": 3}}, False),
        ({"target_modules": [*LINEARS, "lm_head"]}, False),
    ],
)
def test_what_is_taken_is_scaled_as_peft_does(
    settings: dict[str, Any], taken: bool, base: Path, tmp_path: Path
) -> None:
    directory, adapted = saved(base, tmp_path / "adapter", **settings)
    with Adapter(directory, "adapter") as adapter:
        assert (why_not_vllm(adapter, LLAMA) is None) == taken
        config = adapter.config
    equal = all(
        torch.allclose(adapted.get_submodule(name).get_delta_weight("default"), change, rtol=1e-5)
        for name, change in as_vllm_adds(directory, config).items()
    )
    assert equal == (taken or "target_modules" in settings)


@pytest.mark.parametrize(("rank", "most"), [(1, 1), (4, 8), (16, 16), (40, 64), (300, 320)])
def test_the_rank_that_vllm_is_told_is_one_that_it_takes(
    rank: int, most: int, base: Path, tmp_path: Path
) -> None:
    directory, _ = saved(base, tmp_path / "adapter", r=rank, target_modules=["q_proj"])
    with Adapter(directory, "adapter") as adapter:
        assert vllm_options(adapter) == f"--enable-lora --max-lora-rank {most}"
        assert most in VLLM_RANKS
        assert serving_note(adapter, LLAMA) == vllm_options(adapter)


def test_a_rank_beyond_all_is_said(base: Path, tmp_path: Path) -> None:
    directory, _ = saved(base, tmp_path / "adapter", r=513, target_modules=["q_proj"])
    with Adapter(directory, "adapter") as adapter:
        assert "a rank is 513, and vLLM's maximum is 512" in serving_note(adapter, LLAMA)


def test_recover_says_how_its_output_is_served(base: Path, pruned: Path, tmp_path: Path) -> None:
    for name, targets in (("plain", LINEARS), ("head", [*LINEARS, "lm_head"])):
        trained, _ = train_randomly(pruned, tmp_path / name, target_modules=targets)
        recovered = lr.recover(
            lr.RecoverConfig(adapter=trained, base=str(base), output=tmp_path / f"{name}-full")
        )
        said = recovered.manifest.details["vllm"]
        assert said == (
            "--enable-lora --max-lora-rank 8"
            if name == "plain"
            else "cannot be served as an adapter (lm_head is adapted); use loram merge"
        )
