"""The invariants on a real model: SmolLM2-135M-Instruct, 30 layers, 9 query heads on 3 KV heads."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoTokenizer

import loram_ray as lr
from helpers.adapters import (
    LINEARS,
    logits_of,
    run_python,
    train_randomly,
    zero_pruned,
)
from loram_ray.artifacts.tensorfile import Checkpoint
from loram_ray.models.loading import load_model
from loram_ray.plan import PruningPlan

TEXTS = [
    "Pruning removes whole attention heads and neurons; recovery puts the adapter back in place.",
    "The train from Porto to Lisbon leaves at seven and arrives a little before ten, on most days.",
]


@pytest.fixture(scope="module")
def ids(real_base: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(real_base)
    return tokenizer(TEXTS, return_tensors="pt", padding=True).input_ids[:, :16]


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to float32 rounding, carried through 30 layers."""
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


def test_ratio_zero_is_the_real_base_bit_for_bit(
    real_base: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    config = lr.PruneConfig(base=str(real_base), output=tmp_path / "pruned", ratio=0.0)
    output = lr.prune(config).output
    with Checkpoint(real_base) as base, Checkpoint(output) as pruned:
        assert base.specs == pruned.specs
        for name, tensor in base:
            assert torch.equal(tensor.view(torch.uint8), pruned.read(name).view(torch.uint8)), name
    for precision in ("bf16", "fp32"):
        expected = logits_of(load_model(real_base, precision), ids)
        assert torch.equal(logits_of(load_model(output, precision), ids), expected)


def test_the_real_model_shrinks_as_the_method_says(real_pruned: Path) -> None:
    hidden, intermediate, head_dim, vocabulary = 576, 1536, 64, 49152
    kv_heads, neurons = 3 - 1, intermediate - 538  # int(1.05), ceil(537.6)
    whole = 2 * hidden * hidden + 2 * hidden * 192 + 3 * hidden * intermediate
    left = 2 * hidden * 3 * kv_heads * head_dim + 2 * hidden * kv_heads * head_dim
    left += 3 * hidden * neurons
    expected = vocabulary * hidden + hidden + 30 * 2 * hidden + 6 * whole + 24 * left
    model = load_model(real_pruned)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


REMOTE_CODE_AND_PLAIN_PEFT = """
import peft, torch
from transformers import AutoModelForCausalLM

pruned, base, adapter, ids, result = sys.argv[1:]
ids = torch.load(ids)
small = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
model = peft.PeftModel.from_pretrained(model, adapter)
with torch.no_grad():
    torch.save([small(ids).logits, model(input_ids=ids).logits], result)
assert not any(name.partition(".")[0] == "loram_ray" for name in sys.modules)
"""


def test_recovery_on_the_real_model_is_exact_and_loads_without_loram_ray(
    real_base: Path, real_pruned: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    settings = {"r": 8, "lora_alpha": 16, "target_modules": [*LINEARS, "lm_head"]}
    trained, adapted = train_randomly(real_pruned, tmp_path / "trained", **settings)
    recovered = lr.recover(
        lr.RecoverConfig(adapter=trained, base=str(real_base), output=tmp_path / "recovered")
    ).output
    expected = logits_of(adapted, ids)
    with adapted.disable_adapter():
        alone = logits_of(adapted, ids)
    assert (expected - alone).abs().max() > 0.1 * alone.abs().max()

    on_base = peft.PeftModel.from_pretrained(load_model(real_base, "fp32"), recovered)
    unpruned = logits_of(on_base, ids)
    zero_pruned(on_base.unload(), PruningPlan.load(real_pruned))
    zeroed = peft.PeftModel.from_pretrained(on_base.base_model.model, recovered)
    assert_close(logits_of(zeroed, ids), expected)

    torch.save(ids, tmp_path / "ids.pt")
    arguments = [real_pruned, real_base, recovered, tmp_path / "ids.pt", tmp_path / "logits.pt"]
    run_python(REMOTE_CODE_AND_PLAIN_PEFT, tmp_path, *arguments, with_loram_ray=False)
    found = torch.load(tmp_path / "logits.pt")
    assert_close(found[0], alone)
    assert_close(found[1], unpruned)
