"""Run the benchmarks and write RESULTS.md beside this file.

    make bench
    python tests/benchmarks/run.py [recovery] [pruning] [alignment] [calibration] [sparse]

Each measurement runs in a process of its own. Times are medians of rounds in which ours and the
peer take turns; ratios are medians of the rounds' ratios.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from measure import in_fresh_process, machine

HERE = Path(__file__).parent
SAVED = HERE / "results.json"
GB, MB = 1e9, 1e6
DEPTHS, STREAMED = (8, 16, 32), ("flap", "activation", "taylor", "wanda", "sparsegpt")


def recovery(folder: Path) -> dict[str, object]:
    return in_fresh_process(HERE / "recovery.py", str(folder))


def pruning(folder: Path) -> dict[str, object]:
    found = {}
    for layers in (8, 32):
        inner = folder / str(layers)
        inner.mkdir()
        in_fresh_process(HERE / "pruning.py", str(inner), str(layers), "write-the-base")
        found[str(layers)] = in_fresh_process(HERE / "pruning.py", str(inner), str(layers))
    return found


def alignment(folder: Path) -> dict[str, object]:
    sys.path.insert(0, str(HERE.parents[1] / "jobs"))
    import prepare_demo

    import loram_ray as lr

    prepare_demo.write_base(folder / "base")
    prepare_demo.write_text(folder / "text.jsonl")
    pruned = folder / "pruned"
    lr.prune(lr.PruneConfig(base=str(folder / "base"), output=pruned, ratio=0.35, layers=(4, 28)))
    arguments = (str(pruned), str(folder / "text.jsonl"), str(folder))
    return {
        name: in_fresh_process(HERE / "alignment.py", *arguments, kind, cpus)["tokens_per_second"]
        for name, kind, cpus in (
            ("two workers, one core each", "2", "1"),
            ("one worker, one core", "1", "1"),
            ("one worker, two cores", "1", "2"),
            ("no Ray, one process, two cores", "without-ray", "2"),
        )
    }


def calibration(folder: Path) -> dict[str, object]:
    sys.path.insert(0, str(HERE.parents[1] / "jobs"))
    import prepare_demo

    script = HERE / "calibration.py"
    memory: dict[str, dict[str, object]] = {}
    for layers in DEPTHS:
        inner = folder / str(layers)
        inner.mkdir()
        in_fresh_process(script, "write-the-base", str(inner), str(layers))
        for method in STREAMED:
            found = in_fresh_process(script, "memory", str(inner), method, str(layers))
            memory.setdefault(method, {})[str(layers)] = found
            shutil.rmtree(inner / "work")
    real = folder / "real"
    real.mkdir()
    prepare_demo.write_base(real / "base")
    prepare_demo.write_text(real / "text.jsonl")
    workers = {
        method: {
            str(count): in_fresh_process(script, "workers", str(real), method, str(count))
            for count in (1, 2)
        }
        for method in ("flap",)
    }
    layer = folder / "layer"
    layer.mkdir()
    return {
        "memory": memory,
        "workers": workers,
        "layer": in_fresh_process(script, "layer", str(layer)),
    }


def sparse(folder: Path) -> dict[str, object]:
    peer = ["--peer", os.environ["PEER"]] if "PEER" in os.environ else []
    return in_fresh_process(HERE / "sparse.py", str(folder), *peer)


BENCHMARKS = {
    "recovery": recovery,
    "pruning": pruning,
    "alignment": alignment,
    "calibration": calibration,
    "sparse": sparse,
}


def main() -> None:
    chosen = sys.argv[1:] or list(BENCHMARKS)
    results = json.loads(SAVED.read_text()) if SAVED.exists() else {}
    for name in chosen:
        with tempfile.TemporaryDirectory(prefix="loram-bench-") as folder:
            print(f"{name} ...", file=sys.stderr, flush=True)
            results[name] = {
                "date": datetime.date.today().isoformat(),
                "machine": machine(),
                "found": BENCHMARKS[name](Path(folder)),
            }
        SAVED.write_text(json.dumps(results, indent=1) + "\n")
    (HERE / "RESULTS.md").write_text(as_markdown(results))
    print(HERE / "RESULTS.md")


def as_markdown(results: dict[str, dict[str, object]]) -> str:
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "ray", "deepspeed", "transformers")
    )
    parts = [
        "# Benchmarks\n\nMade by `make bench` (one: `python tests/benchmarks/run.py NAME`); "
        f"numbers of that run alone. {packages}.\n"
    ]
    for name, render in (
        ("recovery", _recovery),
        ("pruning", _pruning),
        ("alignment", _alignment),
        ("calibration", _calibration),
        ("sparse", _sparse),
    ):
        if name in results:
            entry = results[name]
            parts.append(render(entry["found"]) + f"\n\n{entry['machine']}; {entry['date']}.\n")
    return "\n".join(parts)


def _recovery(found: dict[str, float]) -> str:
    size = found["bytes"]
    return f"""## Recovery of a 70B adapter

LLaMA-3.1-70B's shapes, 74 of 80 layers pruned at 0.85, r 8 on all seven linears, float32, the
whole stage (inputs verified, base fingerprinted, output hashed and flushed), against copying the
recovered file with a flush.

| | recovered file | recover | copy | ratio (target at most 3) |
|---|---|---|---|---|
| wall | {size / MB:.0f} MB | {found["seconds"]:.2f} s | {found["copy_seconds"]:.2f} s \
| **{found["ratio"]:.2f}** |

Peak memory of the process: {found["peak_bytes"] / MB:.0f} MB, {found["peak_bytes"] / size:.2f} \
times the file (target at most 2); of that {found["peak_before_bytes"] / MB:.0f} MB were there \
before the first recovery (Python, torch, making the input)."""


def _pruning(found: dict[str, dict[str, float]]) -> str:
    rows = "\n".join(
        f"| {layers} | {r['bytes'] / GB:.2f} GB | {r['bytes_per_second'] / MB:.0f} MB/s "
        f"| {r['copy_bytes_per_second'] / MB:.0f} MB/s | {r['ratio']:.2f} "
        f"| {r['peak_bytes'] / MB:.0f} MB |"
        for layers, r in found.items()
    )
    growth = found["32"]["peak_bytes"] / found["8"]["peak_bytes"] - 1
    return f"""## Pruning a synthetic Llama at random

Hidden 2,048, intermediate 8,192, bf16, ratio 0.65; bytes read per second, the whole stage (output
hashed and flushed), against reading and writing the same files with a flush. Pruning writes less
than the copy does: it may be faster than it.

| layers | base | prune | copy | prune / copy | peak memory |
|---|---|---|---|---|---|
{rows}

Peak memory from 8 to 32 layers: {growth:+.1%} (target within 15%)."""


def _alignment(found: dict[str, float]) -> str:
    rows = "\n".join(f"| {name} | {rate:.0f} |" for name, rate in found.items())
    two, one, alone, plain = found.values()
    return f"""## Alignment

SmolLM2-135M pruned at 0.35, 2,048 tokens a step (micro-batches of 2 x 256), bf16, ZeRO-1, AdamW;
median of {6} steps after 2 of warm-up.

| | tokens/s |
|---|---|
{rows}

Two workers against one of one core: **{two / one:.2f}**. On the same two cores: two workers
against one with two threads {two / alone:.2f}, one worker under Ray against the same loop without
Ray **{alone / plain:.2f}**."""


def _calibration(found: dict[str, Any]) -> str:
    memory = "\n".join(
        f"| {method} | "
        + " | ".join(f"{by_depth[str(d)]['peak_bytes'] / MB:.0f} MB" for d in DEPTHS)
        + f" | {by_depth['32']['peak_bytes'] / by_depth['8']['peak_bytes'] - 1:+.1%} "
        f"| {by_depth['32']['before_bytes'] / MB:.0f} MB |"
        for method, by_depth in found["memory"].items()
    )
    parts = [
        f"""## Calibration, layer by layer

Peak memory of one process walking through a synthetic Llama (hidden 1,024, intermediate 2,816; a
layer is 45 MB in float32, 32 layers 1.4 GB) with 8 samples of 128 tokens.

| criterion | {" layers | ".join(map(str, DEPTHS))} layers | from 8 to 32 (target within 15%) \
| before the walk |
|---|---|---|---|---|---|
{memory}"""
    ]
    if "workers" in found:
        rows = "\n".join(
            f"| {method} | {by_count['1']['seconds']:.0f} s | {by_count['2']['seconds']:.0f} s "
            f"| {by_count['1']['seconds'] / by_count['2']['seconds']:.2f} "
            f"| {'yes' if by_count['1']['plan'] == by_count['2']['plan'] else 'no'} |"
            for method, by_count in found["workers"].items()
        )
        parts.append(
            f"""The whole prune stage on SmolLM2-135M (16 samples of 256 tokens), Ray actors of one
core each, the start of Ray and of the actors included:

| criterion | 1 worker | 2 workers | ratio | same plan |
|---|---|---|---|---|
{rows}"""
        )
    if "layer" in found:
        parts.append(_extrapolation(found["layer"]))
    return "\n\n".join(parts)


def _extrapolation(layer: dict[str, float]) -> str:
    from calibration import (
        LLAMA_70B,
        PRUNED_LAYERS_70B,
        operations_of_forward,
        operations_of_hessians,
        operations_of_solve,
        shapes_of,
    )

    def rate(part: str) -> float:
        return layer[f"{part}_operations"] / layer[f"{part}_seconds"]

    shapes, tokens = shapes_of(LLAMA_70B), 128 * 2048
    forward = operations_of_forward(shapes, tokens) / rate("forward")
    both = operations_of_forward(shapes, tokens) + operations_of_hessians(shapes, tokens)
    watched = both / rate("forward_and_hessians")
    solving = sum(operations_of_solve(*s) for s in shapes.values()) / rate("solve_down_proj")
    hours = PRUNED_LAYERS_70B / 3600
    return f"""One layer of Llama-2-7B's size in float32 on this machine, \
{layer["tokens"]:.0f} tokens: forward {layer["forward_seconds"]:.1f} s \
({rate("forward") / GB:.0f} GFLOP/s), forward with Hessians \
{layer["forward_and_hessians_seconds"]:.1f} s ({rate("forward_and_hessians") / GB:.0f} GFLOP/s), \
SparseGPT of `down_proj` {layer["solve_down_proj_seconds"]:.1f} s \
({rate("solve_down_proj") / GB:.0f} GFLOP/s).

**Extrapolated by operation counts, not measured**, to LLaMA-3.1-70B with 128 samples of 2,048
tokens on these two cores: {forward:,.0f} s a layer for a forward criterion \
({forward * hours:,.0f} h for 74 layers), three times that for Taylor, and \
{watched + forward + solving:,.0f} s a layer for SparseGPT (Hessians {watched:,.0f}, solving \
{solving:,.0f}, the pruned layer's forward {forward:,.0f}). On a GPU that keeps 400 TFLOP/s, an
assumption, SparseGPT's two passes would take \
{(both + operations_of_forward(shapes, tokens)) / 4e14:.0f} s a layer."""


def _sparse(found: dict[str, Any]) -> str:
    rows = "\n".join(
        f"| {job['job']} | {' x '.join(map(str, job['shape']))} | {job['ours']['seconds']:.2f} s "
        + (
            f"| {job['peer']['seconds']:.2f} s | **{job['times_fewer_seconds']:.2f}** "
            f"| {job['ours']['error']:.5f} | {job['peer']['error']:.5f} |"
            if "peer" in job
            else f"| | | {job['ours']['error']:.5f} | |"
        )
        for job in found["jobs"]
    )
    return f"""## SparseGPT and Wanda on one linear

Correlated random inputs, {found["tokens"]} tokens, threads: {found["threads"]}; float32, damping
0.01, blocks of 128; the same weight and the same Hessian or norms for both; seconds of the call,
medians of rounds in turns. The peer is llm-compressor's own functions in an environment of its own
(`PEER` names its
interpreter). Errors are of the outputs, relative.

| job | weight | loram_ray | llm-compressor | times faster | error | llm-compressor's |
|---|---|---|---|---|---|---|
{rows}"""


if __name__ == "__main__":
    main()
