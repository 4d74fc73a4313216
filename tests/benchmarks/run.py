"""Run the benchmarks and write RESULTS.md beside this file.

    make bench
    python tests/benchmarks/run.py [recovery] [pruning] [alignment]

Each measurement runs in a process of its own. Times are medians of rounds in which ours and the
peer take turns; ratios are medians of the rounds' ratios.
"""

from __future__ import annotations

import datetime
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from measure import in_fresh_process, machine

HERE = Path(__file__).parent
SAVED = HERE / "results.json"
GB, MB = 1e9, 1e6


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


BENCHMARKS = {"recovery": recovery, "pruning": pruning, "alignment": alignment}


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


if __name__ == "__main__":
    main()
