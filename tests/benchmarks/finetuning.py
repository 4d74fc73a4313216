"""Training's tokens of text per second and memory against Trainer with PEFT, and against TRL.

    python tests/benchmarks/finetuning.py FOLDER
    python tests/benchmarks/finetuning.py FOLDER --trl /path/to/python
    python tests/benchmarks/finetuning.py FOLDER --quick

All train the same LoRA on SmolLM2-135M pruned at 0.65, on CPU, in processes of their own and in
turns: the same conversations (word problems with their solutions, sums, family relations) in the
same order, batch, precision, AdamW, learning rate and clipping, loss on the answers alone. The
Trainer with PEFT pads each micro-batch and computes all logits, as its default loss does; TRL's
SFTTrainer, of the environment whose Python is given, does what it does by default, but for
activation checkpointing, which is off for all. Ours runs as its actor does, without Ray.

A token of text is one that is no padding. A rate is that of all steps after the warm-up ones; peaks
are of the whole process (VmHWM), model and imports included, and above what was resident before the
first step. The losses say that all learn the same. ``--precision fp32`` is for processors that are
slow in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from inputs import write_inputs
from measure import in_fresh_process, median, peak_memory, reset_peak_memory
from transformers import Trainer, TrainerCallback, TrainingArguments

import loram_ray as lr
from loram_ray.models.loading import DTYPES

TASKS = ("gsm_symbolic", "chain_sum", "family_relationships")
EXAMPLES, STEPS, BATCH, MICRO_BATCH, LENGTH, WARM, ROUNDS = 600, 12, 16, 8, 512, 3, 3
QUICK = {"examples": 40, "steps": 4, "rounds": 1}
LORA = {"r": 8, "alpha": 16, "dropout": 0.05}
LEARNING_RATE, WARMUP_STEPS = 1e-4, 2


def write_conversations(path: Path, count: int, characters: int) -> None:
    """So many rows, tasks in turns, but for what would be cut."""
    import reasoning_gym

    sets = [reasoning_gym.create_dataset(task, size=count, seed=1) for task in TASKS]
    with open(path, "w") as file:
        for number in range(count):
            row = sets[number % len(sets)][number]
            answer = row["metadata"].get("answer_cot", row["answer"])
            if len(row["question"]) + len(answer) < characters:
                file.write(json.dumps({"prompt": row["question"], "completion": answer}) + "\n")


class Clock(TrainerCallback):
    """When each step ended, and its loss; memory is measured from the first on."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.resident = 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.whole = peak_memory()
        self.resident = reset_peak_memory()
        self.ends.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


class Counting:
    """A collator that counts the tokens of text of each micro-batch."""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self._collator = collator
        self.counts: list[int] = []

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        self.counts.append(sum(len(row["input_ids"]) for row in rows))
        return self._collator(rows)


def measured(trainer: Trainer, clock: Clock) -> dict[str, Any]:
    """Train, and say what it took."""
    counting = trainer.data_collator = Counting(trainer.data_collator)
    trainer.add_callback(clock)
    trainer.train()
    micro = BATCH // MICRO_BATCH
    first = min(WARM, len(clock.losses) // 2)
    tokens = sum(counting.counts[first * micro : len(clock.losses) * micro])
    return {
        "tokens_per_s": tokens / (clock.ends[-1] - clock.ends[first]),
        "peak_gb": max(clock.whole, peak_memory()) / 1e9,
        "step_gb": (peak_memory() - clock.resident) / 1e9,
        "losses": clock.losses,
    }


def settings_of(folder: Path, options: argparse.Namespace) -> lr.TrainConfig:
    return lr.TrainConfig.model_validate(
        {
            "model": folder / "pruned",
            "output": folder / "out",
            "data": str(folder / "conversations.jsonl"),
            "lora": LORA,
            "steps": options.steps,
            "batch_size": BATCH,
            "micro_batch_size": MICRO_BATCH,
            "max_length": LENGTH,
            "optimiser": {"learning_rate": LEARNING_RATE, "warmup_steps": WARMUP_STEPS},
            "packing": True,
            "precision": options.precision,
            "checkpoint_every": options.steps,
        }
    )


def arguments_of(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Of transformers' TrainingArguments, as ours are."""
    return {
        "output_dir": str(folder / "peer"),
        "max_steps": options.steps,
        "per_device_train_batch_size": MICRO_BATCH,
        "gradient_accumulation_steps": BATCH // MICRO_BATCH,
        "learning_rate": LEARNING_RATE,
        "warmup_steps": WARMUP_STEPS,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": options.precision == "bf16",
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
        "data_seed": 0,
    }


def ours(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What `train_adapter` does, with a clock in its trainer."""
    from loram_ray.finetuning import trainer as module

    found: dict[str, Any] = {}

    class Measured(module.LoraTrainer):
        def train(self, resume_from_checkpoint: Any = None, **_: Any) -> Any:  # type: ignore[override]
            if not found:
                found["running"] = True
                found.update(measured(self, Clock()))
                return None
            return super().train(resume_from_checkpoint=resume_from_checkpoint)

    module.LoraTrainer = Measured  # type: ignore[misc]
    for name in ("work", "out"):
        (folder / name).mkdir()
    module.train_adapter(settings_of(folder, options), folder / "work", folder / "out")
    return found


def lora_of_peers() -> Any:
    import peft

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return peft.LoraConfig(
        r=LORA["r"],
        lora_alpha=LORA["alpha"],
        lora_dropout=LORA["dropout"],
        target_modules=targets,
        task_type="CAUSAL_LM",
    )


def trainer_with_peft(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    import peft
    from transformers import AutoModelForCausalLM

    from loram_ray.corpus.batches import padded
    from loram_ray.corpus.examples import ExampleTable, load_examples
    from loram_ray.models.tokenizer import end_of_text, load_tokenizer

    settings = settings_of(folder, options)
    tokenizer = load_tokenizer(settings.model)
    rows = load_examples(tokenizer, settings.data, LENGTH, 0.0, "train.data")
    table = ExampleTable.write((example for _, example in rows), folder / "peer.arrow")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=DTYPES[options.precision])
    trainer = Trainer(
        model=peft.get_peft_model(model, lora_of_peers()),
        args=TrainingArguments(**arguments_of(folder, options), remove_unused_columns=False),
        train_dataset=table,
        data_collator=lambda rows: padded(rows, end_of_text(tokenizer)),
    )
    return measured(trainer, Clock())


def trl(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    def message(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    lines = (folder / "conversations.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    torch.manual_seed(0)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(
            folder / "pruned", dtype=DTYPES[options.precision]
        ),
        args=SFTConfig(
            **arguments_of(folder, options),
            max_length=LENGTH,
            completion_only_loss=True,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(
            [
                {
                    "prompt": message("user", row["prompt"]),
                    "completion": message("assistant", row["completion"]),
                }
                for row in rows
            ]
        ),
        processing_class=AutoTokenizer.from_pretrained(folder / "pruned"),
        peft_config=lora_of_peers(),
    )
    return measured(trainer, Clock())


WORKS = {"ours": ours, "peft": trainer_with_peft, "trl": trl}


def run_one(who: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    for name in ("work", "out", "peer"):
        shutil.rmtree(folder / name, ignore_errors=True)
    arguments = [str(folder), "--steps", str(options.steps)]
    arguments += ["--precision", options.precision, "--work", who]
    if who != "trl":
        return in_fresh_process(Path(__file__), *arguments)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [options.trl, __file__, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--examples", type=int, default=EXAMPLES)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--trl", help="Python of an environment that has TRL")
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it all run?")
    parser.add_argument("--work", choices=WORKS)
    options = parser.parse_args()
    if options.quick:
        for name, value in QUICK.items():
            setattr(options, name, value)
    folder = options.folder.resolve()
    if options.work is not None:
        print(json.dumps(WORKS[options.work](folder, options)))
        return
    write_inputs(folder, options.quick)
    characters = LENGTH // 2 if options.quick else 2 * LENGTH  # a tiny model's tokens are bytes
    write_conversations(folder / "conversations.jsonl", options.examples, characters)
    peers = ["peft", *(["trl"] if options.trl else [])]
    runs: dict[str, list[dict[str, Any]]] = {who: [] for who in ("ours", *peers)}
    for _ in range(options.rounds):
        for who, of_one in runs.items():
            of_one.append(run_one(who, folder, options))
            print(who, of_one[-1], file=sys.stderr, flush=True)
    print(json.dumps({"precision": options.precision, "trained": summary(runs)}))


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of the rounds, and of the rounds' ratios."""
    keys = ("tokens_per_s", "peak_gb", "step_gb")
    found: dict[str, Any] = {
        who: {
            **{key: median([run[key] for run in of_one]) for key in keys},
            "losses": of_one[0]["losses"],
        }
        for who, of_one in runs.items()
    }
    for who in list(found)[1:]:
        pairs = list(zip(runs["ours"], runs[who], strict=True))
        found[who]["ratios"] = {
            key: median([mine[key] / theirs[key] for mine, theirs in pairs]) for key in keys
        }
    return found


if __name__ == "__main__":
    main()
