"""Alignment's tokens per second against transformers' Trainer with the same DeepSpeed stage.

    python tests/benchmarks/trainer.py FOLDER
    python tests/benchmarks/trainer.py FOLDER --quick

Both train SmolLM2-135M pruned at 0.65 on two processes of one thread and, at ZeRO-1, on one, which
leaves a core of a machine with two to all that is not training, the Trainer's started by
torch's launcher: the same packed sequences in the same order, batch, precision, AdamW, learning
rate, clipping and DeepSpeed dictionary. In turns. A step's rate is that of the median step after
the warm-up ones, by each one's own log of steps; whole seconds are of the command, from no process
to trained weights on disk, the corpus prepared and Ray begun by a command before. The losses say
that both learn the same.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from inputs import read_metrics, write_inputs
from measure import in_fresh_process, median

import loram_ray as lr
from loram_ray.losses import IGNORED
from loram_ray.models.loading import DTYPES

PROCESSES, STAGES, ROUNDS = 2, (1, 2), 3
STEPS, BATCH, LENGTH, MICRO_BATCH, WARM = 12, 8, 256, 2, 4
PRECISION = "a CPU that has only AVX2 multiplies in bf16 7 to 30 times as slowly as in fp32"
QUICK = {"steps": 4, "length": 32, "rounds": 1}


def settings_of(folder: Path, options: argparse.Namespace) -> lr.AlignConfig:
    return lr.AlignConfig.model_validate(
        {
            "pruned": folder / "pruned",
            "output": folder / "aligned",
            "corpus": {
                "sources": [{"path": str(folder / "text.jsonl")}],
                "sequence_length": options.length,
            },
            "objective": "causal_lm",
            "steps": options.steps,
            "batch_size": BATCH,
            "micro_batch_size": MICRO_BATCH,
            "workers": options.processes,
            "optimiser": {"learning_rate": 5e-5, "warmup_steps": 2},
            "zero_stage": options.stages[0],
            "precision": options.precision,
            "checkpoint_every": options.steps,
        }
    )


def ours(settings: lr.AlignConfig) -> dict[str, Any]:
    output = lr.align(settings, lr.RayConfig(num_cpus=6)).output
    lines = read_metrics(output)
    return {
        "tokens_per_s": median([line["tokens_per_s"] for line in lines[warm_of(len(lines)) :]]),
        "losses": [line["loss"] for line in lines],
    }


def warm_of(steps: int) -> int:
    """Steps that are not counted."""
    return min(WARM, steps // 2)


def write_rows(settings: lr.AlignConfig, corpus: Path, target: Path) -> None:
    """The corpus's rows as alignment visits them; padding carries no label."""
    from loram_ray.corpus.stream import Share, open_order, read_chunk

    rows = settings.total_steps * BATCH
    order, share = open_order(corpus, settings.seed), Share(0, rows, BATCH, worker=0, workers=1)
    parts = [read_chunk(order, chunk, share) for chunk in order.chunks(0, rows)]
    ids = np.concatenate([part["input_ids"] for part in parts])
    lengths = np.concatenate([part["length"] for part in parts])
    labels = np.where(np.arange(ids.shape[1]) < lengths[:, None], ids, IGNORED)
    pq.write_table(pa.table({"input_ids": list(ids), "labels": list(labels)}), target)


def peers(settings: lr.AlignConfig, rows: Path, output: Path) -> dict[str, Any] | None:
    """One of the Trainer's processes; the first returns what it measured."""
    from transformers import (
        AutoModelForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        default_data_collator,
    )

    from loram_ray.alignment.deepspeed_config import deepspeed_config, import_deepspeed

    import_deepspeed()  # with gloo, as alignment has it

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Clock(TrainerCallback):
        ends: list[float] = []
        losses: list[float] = []

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

        def on_log(self, *arguments: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" in logs:
                self.losses.append(logs["loss"])

    model = AutoModelForCausalLM.from_pretrained(settings.pruned, dtype=DTYPES[settings.precision])
    model.get_output_embeddings().requires_grad_(False)
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=settings.accumulation(settings.workers),
        max_steps=settings.total_steps,
        learning_rate=settings.optimiser.learning_rate,
        warmup_steps=settings.optimiser.warmup_steps,
        lr_scheduler_type="cosine",
        weight_decay=settings.optimiser.weight_decay,
        max_grad_norm=settings.optimiser.max_grad_norm,
        bf16=settings.precision == "bf16",
        use_cpu=True,
        deepspeed=deepspeed_config(settings, {}, settings.workers),
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=settings.seed,
    )
    trainer = InOrder(
        model=model,
        args=arguments,
        train_dataset=pq.read_table(rows).to_pylist(),
        data_collator=default_data_collator,
        callbacks=[Clock()],
    )
    trainer.train()
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return None
    seconds = np.diff(Clock.ends)[warm_of(settings.total_steps) :]
    tokens = BATCH * settings.corpus.sequence_length
    return {"tokens_per_s": tokens / median(seconds.tolist()), "losses": Clock.losses}


def launched(processes: int, *arguments: str) -> dict[str, Any]:
    """Run this script in processes of torch's launcher; the last line is its result."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={processes}", __file__, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith(b'{"tokens_per_s"')]
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def compare(folder: Path, stage: int, options: argparse.Namespace) -> dict[str, Any]:
    """Rounds in turns at one ZeRO stage."""
    arguments = (str(folder), "--stages", str(stage), *sizes_of(options))
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    for _ in range(options.rounds):
        for who in runs:
            for name in ("aligned", "trained"):
                shutil.rmtree(folder / name, ignore_errors=True)
            started = time.perf_counter()
            if who == "ours":
                found = in_fresh_process(Path(__file__), *arguments, "--work", "ours")
            else:
                found = launched(options.processes, *arguments, "--work", "peer")
            runs[who].append({**found, "seconds": time.perf_counter() - started})
            print(stage, who, runs[who][-1], file=sys.stderr, flush=True)
    pairs = list(zip(runs["ours"], runs["peer"], strict=True))
    return {
        **{
            who: {
                "tokens_per_s": median([run["tokens_per_s"] for run in of_one]),
                "seconds": median([run["seconds"] for run in of_one]),
                "losses": of_one[0]["losses"],
            }
            for who, of_one in runs.items()
        },
        "ratio": median([mine["tokens_per_s"] / theirs["tokens_per_s"] for mine, theirs in pairs]),
        "whole_ratio": median([theirs["seconds"] / mine["seconds"] for mine, theirs in pairs]),
    }


def sizes_of(options: argparse.Namespace) -> tuple[str, ...]:
    names = ("steps", "length", "processes", "precision")
    return tuple(word for name in names for word in (f"--{name}", str(getattr(options, name))))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stages", type=int, nargs="+", default=STAGES)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--precision", choices=list(DTYPES), default="fp32", help=PRECISION)
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it all run?")
    parser.add_argument("--work", choices=["prepare", "ours", "peer"])
    options = parser.parse_args()
    if options.quick:
        for name, value in QUICK.items():
            setattr(options, name, value)
    folder = options.folder.resolve()
    if options.work is None:
        write_inputs(folder, options.quick)
        in_fresh_process(Path(__file__), str(folder), *sizes_of(options), "--work", "prepare")
        found = {str(stage): compare(folder, stage, options) for stage in options.stages}
        one = argparse.Namespace(**{**vars(options), "processes": 1})
        sizes = {
            "steps": options.steps,
            "precision": options.precision,
            "tokens_a_step": BATCH * options.length,
        }
        print(json.dumps({**sizes, "stages": found, "one_process": compare(folder, 1, one)}))
        return
    settings = settings_of(folder, options)
    if options.work == "prepare":
        from loram_ray.corpus.prepare import prepare_corpus
        from loram_ray.runtime.cluster import ray_session

        with ray_session(lr.RayConfig(num_cpus=2)):
            corpus = prepare_corpus(settings.corpus, settings.pruned, folder / "aligned_corpus")
        write_rows(settings, corpus.output, folder / "rows.parquet")
        print("{}")
        return
    if options.work == "ours":
        print(json.dumps(ours(settings)))
        return
    result = peers(settings, folder / "rows.parquet", folder / "trained")
    if result is not None:
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
