"""QLoRAM of LLaMA-3.1-70B on one GPU: peak memory and tokens per second, against plain PEFT.

    python tests/benchmarks/gpu.py
    python tests/benchmarks/gpu.py --lengths 512 --batches 4 --steps 5
    python tests/benchmarks/gpu.py --device cpu --quick

The 70B's shapes pruned at 0.85 as jobs/configs/llama-3.1-70b.yaml does (17.85B parameters), random
weights in NF4 with double quantisation made in place, a LoRA of rank 8 on all linears and on
lm_head, checkpointed activations. *Ours* is the loss and the adapter as `train` has them; the peer
is transformers' own loss over all logits and PEFT as it comes, on the same weights, in turns. Each
step is forward, backward, clipping and AdamW. Predictions are those of `loram plan`.

A machine without a GPU skips it with a message; ``--quick --device cpu`` says whether it all runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from importlib.metadata import version
from typing import Any

import bitsandbytes as bnb
import peft
import torch
from accelerate.big_modeling import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

import loram_ray as lr
from loram_ray.architectures import architecture_of
from loram_ray.estimating.base_configs import PUBLISHED
from loram_ray.estimating.memory_trace import training_memory
from loram_ray.estimating.shapes import config_after, empty_model
from loram_ray.finetuning.adapters import lora_config, save_memory, set_dtype
from loram_ray.losses import summed_loss
from loram_ray.models.nf4 import linears_of, quantize_weight, work_around_cpu_kernels
from loram_ray.models.registration import register

BASE, LAYERS, RATIO = "meta-llama/Llama-3.1-70B", (4, 78), 0.85
LENGTHS, BATCHES, STEPS, WARM = (512, 2048), (1, 2, 4, 8), 6, 2
GB = 1e9


def shapes_of(quick: bool) -> dict[str, Any]:
    """``config.json`` of the pruned model."""
    base, layers = dict(PUBLISHED[BASE]), LAYERS
    if quick:
        sizes = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 512}
        base.update(sizes, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4)
        layers = (1, 3)
    prune = lr.PruneConfig(base=BASE, output="unwritten", ratio=RATIO, layers=layers)
    return config_after(base, prune, empty_model(base))


def in_nf4(linear: nn.Linear, device: str) -> bnb.nn.Linear4bit:
    """A linear of these shapes with random weights."""
    shape = linear.out_features, linear.in_features
    stored = quantize_weight(0.02 * torch.randn(shape, dtype=torch.bfloat16, device=device))
    with torch.device("meta"):
        made = bnb.nn.Linear4bit(*reversed(shape), bias=False, compute_dtype=torch.bfloat16)
    made.weight = bnb.nn.Params4bit.from_prequantized(
        data=stored.pop(""),
        quantized_stats={name[1:]: part for name, part in stored.items()},
        requires_grad=False,
        device=device,
        module=made,
    )
    return made


def build(shapes: dict[str, Any], device: str) -> PreTrainedModel:
    """The pruned model with random weights, one linear in bfloat16 at a time."""
    register()
    settings = {k: v for k, v in shapes.items() if k not in ("model_type", "auto_map")}
    config = AutoConfig.for_model(shapes["model_type"], **settings)
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    torch.manual_seed(0)
    for name in linears_of(model):
        parent, _, child = name.rpartition(".")
        made = in_nf4(model.get_submodule(name), device)
        setattr(model.get_submodule(parent), child, made)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device.type == "meta":
                values = torch.ones if parameter.dim() == 1 else torch.randn
                filled = values(parameter.shape, dtype=torch.bfloat16, device=device)
                setattr(module, name, nn.Parameter(0.02 * filled, requires_grad=False))
    model.is_loaded_in_4bit = True
    if device == "cpu":
        work_around_cpu_kernels(model)
    return model.to(device).requires_grad_(False)


def adapted(model: PreTrainedModel, config: lr.TrainConfig, ours: bool) -> peft.PeftModel:
    """The model with a new adapter, which is taken off again by `unload`."""
    torch.manual_seed(0)
    found = peft.get_peft_model(model, lora_config(config.lora, architecture_of("llama"))).train()
    set_dtype(found, config.lora)
    if ours:
        save_memory(found, config)
    else:
        found.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    return found


def measure(
    model: PreTrainedModel, config: lr.TrainConfig, ours: bool, steps: int, device: str
) -> dict[str, Any]:
    """Steps on random tokens; out of memory is a result too."""
    shape = config.micro_batch_size, config.max_length
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.vocab_size, shape, generator=generator).to(device)
    mask = torch.ones_like(ids)
    lora = adapted(model, config, ours)
    trained = [p for p in lora.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    seconds, losses = [], []
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        for _ in range(steps):
            synchronise(device)
            started = time.perf_counter()
            with torch.autocast(device, torch.bfloat16):
                if ours:
                    total, count = summed_loss(lora.get_base_model(), ids, mask, ids)
                    loss = total / count
                else:
                    loss = lora(input_ids=ids, attention_mask=mask, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            optimiser.zero_grad()
            synchronise(device)
            seconds.append(time.perf_counter() - started)
            losses.append(float(loss.detach()))
    except torch.cuda.OutOfMemoryError:
        return {"out_of_memory": True}
    finally:
        lora.unload()
        model.activation_checkpointing_disable()
        optimiser.zero_grad()
    timed = sorted(seconds[min(WARM, len(seconds) // 2) :])
    found = {
        "tokens_per_s": ids.numel() / timed[len(timed) // 2],
        "losses": losses,
        "loss_labels": ids.numel() - len(ids),
    }
    if device == "cuda":
        found["allocated_gb"] = torch.cuda.max_memory_allocated() / GB
        found["reserved_gb"] = torch.cuda.max_memory_reserved() / GB
    return found


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it all run?")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("skipped: this needs a GPU", file=sys.stderr)
        return
    if options.quick:
        options.lengths, options.batches, options.steps = (32,), (2,), 3
    shapes = shapes_of(options.quick)
    model = build(shapes, options.device)
    card = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{card}: {sum(p.nbytes for p in model.parameters()) / GB:.2f} GB", file=sys.stderr)
    rows = []
    for length, batch in itertools.product(options.lengths, options.batches):
        config = lr.TrainConfig.model_validate(
            {
                "model": "unread",
                "output": "unwritten",
                "data": "unread",
                "lora": {"r": 8, "alpha": 16, "dropout": 0.0, "lm_head": True},
                "batch_size": batch,
                "micro_batch_size": batch,
                "max_length": length,
                "activation_checkpointing": True,
            }
        )
        row: dict[str, Any] = {"length": length, "batch": batch}
        plan = training_memory(shapes, architecture_of("llama"), config, quantized=True)
        row["planned_gb"] = plan.total / GB
        for who in ("ours", "peer"):
            row[who] = measure(model, config, who == "ours", options.steps, options.device)
        if "tokens_per_s" in row["ours"] and "tokens_per_s" in row["peer"]:
            row["ratio"] = row["ours"]["tokens_per_s"] / row["peer"]["tokens_per_s"]
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    packages = {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
    print(json.dumps({"card": card, "versions": packages, "rows": rows}))


if __name__ == "__main__":
    main()
