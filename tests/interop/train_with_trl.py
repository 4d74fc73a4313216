"""Train a LoRA on a pruned model with TRL, where loram_ray is not installed.

    python train_with_trl.py {sft,dpo,grpo} MODEL ROWS OUTPUT

ROWS is a file of JSON lines with prompts and completions. DPO prefers each completion to that of
the next row, and GRPO rewards short answers, which is enough for a few steps of training.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def main(method: str, model_directory: str, data: str, output: str) -> None:
    """Train three steps and save the adapter as TRL does."""
    torch.manual_seed(0)
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()[:40]]
    model = AutoModelForCausalLM.from_pretrained(
        model_directory, trust_remote_code=True, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    common: dict[str, Any] = {
        "output_dir": output,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
    }
    given: dict[str, Any] = {"model": model, "processing_class": tokenizer, "peft_config": LORA}
    trainer: Any
    if method == "sft":
        settings = SFTConfig(max_length=128, **common)
        trainer = SFTTrainer(args=settings, train_dataset=Dataset.from_list(rows), **given)
    elif method == "dpo":
        others = [*rows[1:], rows[0]]
        pairs = [
            {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other["completion"]}
            for row, other in zip(rows, others, strict=True)
            if row["completion"] != other["completion"]
        ]
        settings = DPOConfig(max_length=128, **common)
        trainer = DPOTrainer(args=settings, train_dataset=Dataset.from_list(pairs), **given)
    else:
        settings = GRPOConfig(num_generations=4, max_completion_length=16, **common)
        trainer = GRPOTrainer(
            args=settings,
            reward_funcs=lambda completions, **_: [-float(len(text)) for text in completions],
            train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
            **given,
        )
    trainer.train()
    trainer.save_model(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
