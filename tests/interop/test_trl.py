"""Adapters that TRL trains on a pruned SmolLM2 are recovered exactly.

TRL runs in an environment of its own, without loram_ray; see ``make interop``.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

import loram_ray as lr
from helpers import tiny
from helpers.adapters import logits_of, zero_pruned
from loram_ray.models.loading import load_model
from loram_ray.plan import PruningPlan

pytestmark = pytest.mark.interop
SCRIPT = Path(__file__).with_name("train_with_trl.py")
ENVIRONMENT = Path(__file__).parents[2] / os.environ.get("INTEROP", ".interop") / "trl"


@pytest.mark.parametrize("method", ["sft", "dpo", "grpo"])
def test_what_trl_trains_is_recovered_exactly(
    method: str, real_base: Path, real_pruned: Path, tmp_path: Path
) -> None:
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.questions())
    trained = tmp_path / "trained"
    command = [ENVIRONMENT / "bin/python", "-I", SCRIPT, method, real_pruned, rows, trained]
    modules = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        list(map(str, command)),
        env={**os.environ, **modules},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    tensors = load_file(trained / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)

    result = lr.recover(
        lr.RecoverConfig(adapter=trained, base=str(real_base), output=tmp_path / "adapter")
    )
    assert result.manifest.details["trained"] == "elsewhere"
    ids = torch.randint(40_000, (2, 24), generator=torch.Generator().manual_seed(0))
    plain = load_model(real_pruned, "fp32")
    without = logits_of(plain, ids)
    expected = logits_of(peft.PeftModel.from_pretrained(plain, trained), ids)
    zeroed = zero_pruned(load_model(real_base, "fp32"), PruningPlan.load(real_pruned))
    found = logits_of(peft.PeftModel.from_pretrained(zeroed, result.output), ids)
    effect = (expected - without).abs().max()
    assert effect > 1e-2
    assert (found - expected).abs().max() < 1e-3 * effect
