"""SparseGPT and Wanda on one linear, against llm-compressor's functions on the same tensors.

The peer has an environment of its own, with whatever torch it asks for:

    python3.11 -m venv /tmp/peer && /tmp/peer/bin/pip install llmcompressor
    OMP_NUM_THREADS=2 python tests/benchmarks/sparse.py FOLDER --peer /tmp/peer/bin/python

Without ``--peer`` only ours is measured. ``--inputs``, ``--tokens`` and ``--rounds`` make it
smaller. Both get the same weight and the same Hessian or norms (llm-compressor's own accumulation
of the same inputs is timed beside ours and compared), the same blocks and damping, and are scored
by one formula. SparseGPT's seconds are of the call alone; ours includes its error, which the
peer's does not have.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import median
from safetensors.torch import load_file, save_file

OUTPUTS, TOKENS, INPUTS, ROUNDS = 4096, 4096, (4096, 11008), 3
DAMPING, BLOCK, RATIO = 0.01, 128, 0.5
JOBS = ("sparsegpt 2:4", "sparsegpt unstructured", "wanda 2:4", "wanda unstructured")


def write_linear(file: Path, inputs: int, tokens: int) -> None:
    """A weight, and inputs whose coordinates are correlated and of uneven size, as in a model."""
    generator = torch.Generator().manual_seed(inputs)
    hidden = torch.randn(tokens, inputs // 8, generator=generator)
    mixing = torch.randn(inputs // 8, inputs, generator=generator) / (inputs // 8) ** 0.5
    noise = torch.randn(tokens, inputs, generator=generator)
    sizes = torch.randn(inputs, generator=generator).exp()
    weight = torch.randn(OUTPUTS, inputs, generator=generator) / inputs**0.5
    save_file({"weight": weight, "x": (hidden @ mixing + 0.3 * noise) * sizes}, file)


def ours(job: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    from loram_ray.pruning.sparse import Pattern, sparsegpt, wanda_mask

    weight, x = tensors["weight"], tensors["x"]
    method, pattern = job.split()[0], Pattern.parse(job.split()[1])
    if method == "wanda":
        norms, prepared = timed(lambda: x.norm(dim=0))
        pruned, seconds = timed(lambda: weight * wanda_mask(weight, norms, RATIO, pattern))
        return {"seconds": seconds, "prepared": prepared, "weight": pruned, "statistic": norms**2}
    hessian, prepared = timed(lambda: (x.t() @ x).mul_(2 / len(x)))
    result, seconds = timed(
        lambda: sparsegpt(weight, hessian, RATIO, pattern, damping=DAMPING, block_size=BLOCK)
    )
    return {
        "seconds": seconds,
        "prepared": prepared,
        "weight": result.weight,
        "reported_error": result.error,
        "statistic": hessian,
    }


def peers(job: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    from llmcompressor.modifiers.pruning.sparsegpt import sgpt_sparsify
    from llmcompressor.modifiers.pruning.wanda import wanda_sparsify

    weight, x = tensors["weight"], tensors["x"]
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    zeros, group = (2, 4) if job.endswith("2:4") else (0, 0)
    # It counts samples, of any length: tokens one by one make its Hessian ours.
    samples = x.unsqueeze(1)
    with torch.no_grad():
        if job.startswith("wanda"):
            scalars = wanda_sparsify.make_empty_row_scalars(linear)
            (scalars, _), prepared = timed(
                lambda: wanda_sparsify.accumulate_row_scalars(samples, linear, scalars, 0)
            )
            pruned, seconds = timed(
                lambda: wanda_sparsify.sparsify_weight(
                    linear, {linear: scalars}, RATIO, zeros, group
                )
            )
            statistic = scalars * len(x)
        else:
            hessian = sgpt_sparsify.make_empty_hessian(linear)
            (hessian, _), prepared = timed(
                lambda: sgpt_sparsify.accumulate_hessian(samples, linear, hessian, 0)
            )
            statistic = hessian.clone()
            (_, pruned), seconds = timed(
                lambda: sgpt_sparsify.sparsify_weight(
                    linear, {linear: hessian}, RATIO, zeros, group, BLOCK, DAMPING, False
                )
            )
    return {"seconds": seconds, "prepared": prepared, "weight": pruned, "statistic": statistic}


def timed(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Seconds of the clock, and of processors: the latter stay comparable on a busy machine."""
    started, busy = time.perf_counter(), time.process_time()
    result = call()
    seconds = {"wall": time.perf_counter() - started, "cpu": time.process_time() - busy}
    return result, seconds


def work(who: str, job: str, linear: Path, target: Path) -> None:
    """One run, in a process and an environment of its own."""
    tensors = {name: tensor.clone() for name, tensor in load_file(linear).items()}
    measured = {"ours": ours, "peer": peers}[who](job, tensors)
    tensors = {name: measured.pop(name).contiguous() for name in ("weight", "statistic")}
    save_file(tensors, target)
    print(json.dumps({**measured, "load": os.getloadavg()[0]}))


def run(python: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [python, __file__, "--work", *arguments], stdout=subprocess.PIPE, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def output_error(linear: dict[str, torch.Tensor], pruned: torch.Tensor) -> float:
    """``|X (W - W')^T|^2 / |X W^T|^2``, from the inputs themselves."""
    weight, x = linear["weight"], linear["x"]
    lost = sum(
        float((part @ (weight - pruned).t()).double().square().sum()) for part in x.split(512)
    )
    whole = sum(float((part @ weight.t()).double().square().sum()) for part in x.split(512))
    return lost / whole


def compare(job: str, file: Path, pythons: dict[str, str], rounds: int) -> dict[str, Any]:
    """Rounds in turns; errors and zeros of the first."""
    runs: dict[str, list[dict[str, Any]]] = {who: [] for who in pythons}
    results: dict[str, dict[str, torch.Tensor]] = {}
    for _ in range(rounds):
        for who, python in pythons.items():
            target = file.with_name(f"{who}.safetensors")
            runs[who].append(run(python, who, job, str(file), str(target)))
            print(job, who, runs[who][-1], file=sys.stderr, flush=True)
            if who not in results:
                results[who] = load_file(target)
            target.unlink()
    linear = load_file(file)
    line: dict[str, Any] = {"job": job, "shape": list(linear["weight"].shape)}
    for who, result in results.items():
        line[who] = {
            "seconds": median([run["seconds"]["wall"] for run in runs[who]]),
            "cpu_seconds": median([run["seconds"]["cpu"] for run in runs[who]]),
            "all_seconds": [round(run["seconds"]["wall"], 3) for run in runs[who]],
            "statistics_seconds": median([run["prepared"]["wall"] for run in runs[who]]),
            "error": output_error(linear, result["weight"]),
            "zeros": float((result["weight"] == 0).double().mean()),
            "load": max(run["load"] for run in runs[who]),
        }
        if "reported_error" in runs[who][0]:
            line[who]["reported_error"] = runs[who][0]["reported_error"]
    if "peer" in results:
        for clock in ("seconds", "cpu_seconds"):
            line[f"times_fewer_{clock}"] = line["peer"][clock] / line["ours"][clock]
        mine, theirs = results["ours"], results["peer"]
        difference = (mine["statistic"] - theirs["statistic"]).norm() / mine["statistic"].norm()
        line["statistics_differ_by"] = float(difference)
        same = (mine["weight"] == 0) == (theirs["weight"] == 0)
        line["mask_agrees"] = float(same.double().mean())
    return line


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        who, job, linear, target = sys.argv[2:]
        work(who, job, Path(linear), Path(target))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peer", help="interpreter of an environment with llmcompressor")
    parser.add_argument("--inputs", type=int, nargs="+", default=INPUTS)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS)
    options = parser.parse_args()
    pythons = {"ours": sys.executable, **({"peer": options.peer} if options.peer else {})}
    options.folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for inputs in options.inputs:
        file = options.folder / f"linear_{inputs}.safetensors"
        write_linear(file, inputs, options.tokens)
        lines += [compare(job, file, pythons, options.rounds) for job in options.jobs]
        file.unlink()
    print(json.dumps({"tokens": options.tokens, "threads": torch.get_num_threads(), "jobs": lines}))


if __name__ == "__main__":
    main()
