"""The benchmarks' results as Markdown."""

from __future__ import annotations

from typing import Any

GB, MB = 1e9, 1e6
DEPTHS = (8, 16, 32)
CORRECTED = (4, 8)


def as_markdown(results: dict[str, dict[str, object]]) -> str:
    parts = [
        "# Benchmarks\n\nMade by `make bench` (one: `python tests/benchmarks/run.py NAME`). Each "
        "section names the commit that it was recorded with, whose `constraints.txt` has the "
        "versions.\n"
    ]
    for name, render in (
        ("recovery", _recovery),
        ("correction", _correction),
        ("pruning", _pruning),
        ("corpus", _corpus),
        ("alignment", _alignment),
        ("trainer", _trainer),
        ("finetuning", _finetuning),
        ("together", _together),
        ("batching", _batching),
        ("scheduling", _scheduling),
        ("submitting", _submitting),
        ("thousand", _thousand),
        ("evaluation", _evaluation),
        ("partitions", _partitions),
        ("targets", _targets),
        ("standstill", _standstill),
        ("calibration", _calibration),
        ("sparse", _sparse),
    ):
        if name in results:
            entry = results[name]
            parts.append(render(entry["found"]) + f"\n\n{_origin(entry)}\n")
    return "\n".join(parts)


def _origin(entry: dict[str, Any]) -> str:
    return f"{entry['machine']}; {entry['date']}; commit {entry['commit'][:10]}."


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


def _correction(found: dict[str, Any]) -> str:
    names = {"whole": "bf16", "nf4": "NF4"}
    rows = "\n".join(
        f"| {names[kind]} | {layers} | {r['model_bytes'] / GB:.1f} GB | {r['corrected']} "
        f"| {r['seconds']:.1f} s | {r['peak_bytes'] / MB:.0f} MB "
        f"| **{r['peak_bytes'] / r['layer_bytes']:.2f}** |"
        for kind, by_layers in found.items()
        for layers, r in by_layers.items()
    )
    layer = next(iter(found["whole"].values()))["layer_bytes"]
    return f"""## Recovery of a 70B adapter with the correction

The first layers of LLaMA-3.1-70B's shapes, all but the first pruned at 0.85, r 8 on all seven
linears and `lm_head`; the base is a sparse file of zeros, what was trained on has random weights.
Peak memory beyond what the process had before, against one layer of the base in bf16 \
({layer / GB:.2f} GB; target at most 1).

| trained on | layers | its linears | corrected | recover | peak memory | of a layer |
|---|---|---|---|---|---|---|
{rows}"""


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


def _corpus(found: dict[str, Any]) -> str:
    rows = "\n".join(
        f"| {size} MB | {one['tokens']:,} | {one['bytes'] / MB:.0f} MB "
        f"| {(one['bytes'] - one['before']) / MB:.0f} MB |"
        for size, one in found["memory"].items()
    )
    ratios = ", ".join(f"{one['ratio']:.2f}" for one in found["rounds"])
    return f"""## Tokenising and packing text

{found["megabytes"]} MB of JSON lines, SmolLM2's tokenizer, sequences of 1,024 tokens,
two processes, against Hugging Face datasets' `map`: rows a second, medians of rounds in turns.

| loram_ray | datasets | ratio (target at least 1) | of each round |
|---|---|---|---|
| {found["rows_per_s"]["ours"]:.1f} | {found["rows_per_s"]["peer"]:.1f} | **{found["ratio"]:.2f}** \
| {ratios} |

Peak memory of the process that prepares one gzip archive, exact duplicates found:

| text in it | tokens | peak | of it, preparing |
|---|---|---|---|
{rows}"""


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


def _trainer(found: dict[str, Any]) -> str:
    named = {f"ZeRO-{stage}": r for stage, r in found["stages"].items()}
    named["ZeRO-1, one process"] = found["one_process"]
    rows = "\n".join(
        f"| {name} | {r['ours']['tokens_per_s']:.0f} | {r['peer']['tokens_per_s']:.0f} "
        f"| **{r['ratio']:.2f}** | {r['ours']['seconds']:.0f} s | {r['peer']['seconds']:.0f} s "
        f"| {r['whole_ratio']:.2f} | {_difference(r):.4f} |"
        for name, r in named.items()
    )
    return f"""## Alignment against transformers' Trainer

SmolLM2-135M pruned at 0.65 on two processes of one thread, {found["precision"]},
{found["tokens_a_step"]:,} tokens a step, {found["steps"]} steps; the Trainer with the same
DeepSpeed dictionary, the same rows in the same order, started by torch's launcher. Median steps
after the warm-up ones; medians of rounds in turns. The whole command is from no process to weights
on disk, with no corpus to prepare.

| | tokens/s | Trainer's | ratio (target at least 1) | whole command | Trainer's | ratio \
| losses differ by at most |
|---|---|---|---|---|---|---|---|
{rows}"""


def _difference(found: dict[str, Any]) -> float:
    pairs = zip(found["ours"]["losses"], found["peer"]["losses"], strict=True)
    return max(abs(mine - theirs) for mine, theirs in pairs)


def _finetuning(found: dict[str, Any]) -> str:
    names = {"ours": "ours", "peft": "Trainer with PEFT", "trl": "TRL's SFTTrainer"}
    trained = found["trained"]
    rows = []
    for who, of_one in trained.items():
        ratios = of_one.get("ratios")
        compared = ("", "", "", "")
        if ratios is not None:
            differ = _difference({"ours": trained["ours"], "peer": of_one})
            keys = ("tokens_per_s", "peak_gb", "step_gb")
            compared = (*(f"**{ratios[key]:.2f}**" for key in keys), f"{differ:.4f}")
        cells = (
            names[who],
            f"{of_one['tokens_per_s']:.0f}",
            f"{of_one['peak_gb']:.2f} GB",
            f"{of_one['step_gb']:.2f} GB",
            *compared,
        )
        rows.append("| " + " | ".join(cells) + " |")
    table = "\n".join(rows)
    return f"""## Fine-tuning against Trainer with PEFT, and TRL

SmolLM2-135M pruned at 0.65, LoRA r 8 on all seven linears, {found["precision"]},
{len(trained["ours"]["losses"])} steps of 16 conversations (gsm_symbolic with its solutions,
chain_sum, family_relationships), 8 in a forward, in the same order, without checkpointed
activations; ours packs them. Medians of rounds in turns. A token is one that is no padding; peaks
are of the process, and above what was resident before the first step. Ratios are ours to the
peer's (targets: at least 1.2 of the tokens, at most 0.9 of the memory).

| | tokens/s | peak | of it in steps | ours: tokens/s | peak | in steps \
| losses differ by at most |
|---|---|---|---|---|---|---|---|
{table}"""


def _together(found: dict[str, Any]) -> str:
    rows = "\n".join(
        f"| {kind} | {row['adapters']} | {row['apart']['examples_per_s']:.2f} "
        f"| {row['together']['examples_per_s']:.2f} | **{row['speed']:.2f}** "
        f"| {row['together']['memory_gb']:.2f} GB | **{row['memory']:.2f}** |"
        for kind, of_kind in found.items()
        for row in of_kind["rows"]
    )
    batch = next(iter(found.values()))["batch"]
    return f"""## Adapters together on one copy of the model

SmolLM2-135M pruned at 0.65, LoRA r 8 on all seven linears, fp32; each adapter has a reasoning-gym
task of its own, {batch} examples in a step. Examples per second of K adapters in one forward
against K trainings one after another, and the process's peak memory against K times that of one
training, as K actors have it.

| weights | adapters | apart, examples/s | together | times | peak | of K peaks |
|---|---|---|---|---|---|---|
{rows}"""


def _batching(found: dict[str, Any]) -> str:
    return f"""## A batch against the ideal

{found["tasks"]} reasoning-gym tasks of {found["steps"]} steps on SmolLM2-135M pruned at 0.65, \
{found["actors"]} actors of one thread, {found["adapters"]} at a time in each. The steps of all
tasks at their own pace, shared out to the actors: {found["ideal_seconds"]:.0f} s. From the first to
the last adapter recovered: {found["seconds"]:.0f} s, so **{found["efficiency"]:.2f}** of the ideal
(target at least 0.9). The whole command with loading: {found["whole_seconds"]:.0f} s."""


def _scheduling(found: dict[str, Any]) -> str:
    rows = "\n".join(
        f"| {kind} | {row['tasks']:,} | {row['gpus']} | {row['hours']:.1f} "
        f"| {row['preemptions']:,} | {row['idle']:.2%} "
        f"| {row['microseconds_a_task']:.0f} us | {row['peak_mb']:.1f} MB |"
        for kind, of_kind in found.items()
        for row in of_kind
    )
    return f"""## The batch's schedule at scale, simulated

The schedule that `loram batch` uses, in virtual time; each GPU is preempted once in six hours, at
random, and back after five minutes; a model is loaded in a minute. Durations drawn (lognormal, a
median of ten minutes) or those of the batch above, stretched to an hour each on the average. Idle:
the GPUs' time without load or training, mostly when fewer tasks are left than GPUs.

| durations | tasks | GPUs | hours | preemptions | idle | schedule's time a task | its memory |
|---|---|---|---|---|---|---|---|
{rows}"""


def _submitting(found: dict[str, Any]) -> str:
    rows = "\n".join(f"| `{way}` | {one['seconds']:.1f} s |" for way, one in found.items())
    return f"""## From the command to the first step

A tiny model's training; medians of rounds in which the ways take turns, on a cluster of two nodes
that are processes of this machine.

| | to the first step |
|---|---|
{rows}"""


def _thousand(found: dict[str, Any]) -> str:
    seen = ", ".join(f"{mb} MB after {count}" for count, mb in found["memory_mb"].items())
    states = ", ".join(f"{count:,} {state}" for state, count in found["tasks"].items())
    return f"""## A thousand tasks in a batch

Tiny tasks of one step each, recovered, on two actors: {states};
{found["seconds_a_task"]:.2f} s a task. The driver's memory: {seen}, {found["last_mb"]} MB at the
end (**{found["kb_a_task"]:.1f} kB a task**). Its page (`loram report`): \
**{found["report"]["mb"]:.2f} MB in {found["report"]["seconds"]:.1f} s** (targets: 3 MB, 10 s)."""


def _evaluation(found: dict[str, Any]) -> str:
    rows = "\n".join(
        f"| {kind} | {one['items']} | {one['items_per_s']['theirs']:.2f} "
        f"| {one['items_per_s']['ours']:.2f} | **{one['times']:.2f}** "
        f"| {one['scores']['theirs']:.4f} | {one['scores']['ours']:.4f} |"
        for kind, one in found.items()
    )
    return f"""## Evaluation against lm-eval

SmolLM2-135M in fp32, the same items, prompts and batches of {found["choice"]["batch"]}: multiple
choice with one solved example in front, generation with eight, against lm-eval's Hugging Face
backend (target: 1.5 times the items a second).

| | items | lm-eval, items/s | loram_ray | times | lm-eval's score | loram_ray's |
|---|---|---|---|---|---|---|
{rows}"""


def _partitions(found: dict[str, Any]) -> str:
    rows = "\n".join(
        f"| {workers} | {r['load'] / MB:.0f} MB | {r['held'] / MB:.0f} MB "
        f"| {r['export'] / MB:.0f} MB | {r['load_seconds']:.1f} s | {r['export_seconds']:.1f} s |"
        for workers, r in found["workers"].items()
    )
    fits = "; ".join(
        f"{name} **{f['constant'] / MB:.0f} MB + {f['slope'] / MB:.0f} MB / workers** "
        f"(within {f['residual'] / MB:.0f} MB)"
        for name, f in found["fit"].items()
    )
    return f"""## Loading and exporting ZeRO-3 partitions

A random Llama of {found["bytes"] / MB:.0f} MB in bf16, gloo; the largest process's memory beyond
what it had after its imports: at most while loading, afterwards, and at most while exporting.

| workers | loading | held | exporting | load | export |
|---|---|---|---|---|---|
{rows}

Least squares: {fits}."""


def _targets(found: dict[str, dict[str, float]]) -> str:
    rows = "\n".join(
        f"| {'live' if kind == 'live' else f'cached, {kind} likeliest tokens'} "
        + (
            f"| {r['targets_tokens_per_s']:.0f} | {r['training_tokens_per_s']:.0f} "
            f"| {r['tokens_per_s']:.0f} | {r['bytes_per_token']:.0f} "
            f"| {r['missing_probability']:.1%} |"
            if "bytes_per_token" in r
            else f"| | {r['training_tokens_per_s']:.0f} | {r['tokens_per_s']:.0f} | | |"
        )
        for kind, r in found.items()
    )
    return f"""## What distillation costs

SmolLM2-135M pruned at 0.65, one worker of one thread, fp32. *Together* is a token's pass through
the base and its training, each once.

| targets | pass of the base, tokens/s | training, tokens/s | together | bytes a token \
| probability missed |
|---|---|---|---|---|---|
{rows}"""


def _standstill(found: dict[str, Any]) -> str:
    def share(name: str) -> str:
        return "unknown" if found[name] is None else f"{found[name]:.2%}"

    return f"""## Waiting in alignment

SmolLM2-135M pruned at 0.65, two workers of one thread, ZeRO-1, {found["steps"]} steps after the
first ({found["training_seconds"]:.0f} s), {found["checkpoints"]} checkpoints. Waited for data:
**{share("data_share")}** of the steps. Stood still for checkpoints: **{share("checkpoint_share")}**
of steps and checkpoints together. Of a checkpoint's time, **{share("hidden_share")}** is copying,
beside the next steps."""


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
    )

    def rate(part: str) -> float:
        return layer[f"{part}_operations"] / layer[f"{part}_seconds"]

    shapes, tokens = LLAMA_70B.linears(), 128 * 2048
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
