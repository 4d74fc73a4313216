"""Alignment's tokens per second on SmolLM2-135M pruned at 0.35, two cores.

python tests/benchmarks/alignment.py PRUNED TEXT FOLDER WORKERS CPUS
python tests/benchmarks/alignment.py PRUNED TEXT FOLDER without-ray CPUS

The second form is the same loop, model, DeepSpeed settings and data in one process without Ray.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from inputs import read_metrics
from measure import median

import loram_ray as lr

STEPS, BATCH, LENGTH, MICRO_BATCH, WARM = 8, 8, 256, 2, 2


def config(pruned: Path, text: Path, output: Path, workers: int, cpus: int) -> lr.AlignConfig:
    return lr.AlignConfig.model_validate(
        {
            "pruned": pruned,
            "output": output,
            "corpus": {"sources": [{"path": str(text)}], "sequence_length": LENGTH},
            "objective": "causal_lm",
            "steps": STEPS,
            "batch_size": BATCH,
            "micro_batch_size": MICRO_BATCH,
            "workers": workers,
            "cpus_per_worker": cpus,
            "checkpoint_every": STEPS,
        }
    )


def with_ray(settings: lr.AlignConfig) -> float:
    output = lr.align(settings, lr.RayConfig(num_cpus=6)).output
    return median([line["tokens_per_s"] for line in read_metrics(output)[WARM:]])


def without_ray(settings: lr.AlignConfig, corpus: Path) -> float:
    from loram_ray.alignment.batches import to_device
    from loram_ray.alignment.engine import start_engine
    from loram_ray.corpus.stream import Share, open_order, read_chunk

    torch.set_num_threads(settings.cpus_per_worker)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    torch.distributed.init_process_group("gloo")
    engine, _ = start_engine(settings, {}, None, 1, None, False)
    order, share = open_order(corpus, 0), Share(0, STEPS * BATCH, BATCH, worker=0, workers=1)
    found = [read_chunk(order, chunk, share) for chunk in order.chunks(0, STEPS * BATCH)]
    rows = {key: np.concatenate([part[key] for part in found]) for key in found[0]}
    rates = []
    for step in range(STEPS):
        started = time.perf_counter()
        for start in range(step * BATCH, (step + 1) * BATCH, MICRO_BATCH):
            part = {key: value[start : start + MICRO_BATCH] for key, value in rows.items()}
            batch = to_device(part, engine.device, None)
            engine.backward(engine(batch.input_ids, batch.labels)[0])
            engine.step()
        rates.append(BATCH * LENGTH / (time.perf_counter() - started))
    torch.distributed.destroy_process_group()
    return median(rates[WARM:])


def main() -> None:
    pruned, text, folder = (Path(a).resolve() for a in sys.argv[1:4])
    kind, cpus = sys.argv[4], int(sys.argv[5])
    workers = 1 if kind == "without-ray" else int(kind)
    settings = config(pruned, text, folder / f"aligned_{kind}_{cpus}", workers, cpus)
    if kind == "without-ray":
        rate = without_ray(settings, next(folder.glob("aligned_*_corpus")))
    else:
        rate = with_ray(settings)
    print(json.dumps({"tokens_per_second": rate}))


if __name__ == "__main__":
    main()
