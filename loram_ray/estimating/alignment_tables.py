"""Format estimates of an alignment as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence

from loram_ray.estimating.alignment import GB, GPU_MEMORY, Estimate
from loram_ray.estimating.flops import NVLINK
from loram_ray.estimating.forecast import AlignmentForecast
from loram_ray.estimating.gpus import Cluster

_PARTS = (
    "weights",
    "base",
    "optimiser",
    "gradients",
    "buckets",
    "gathered",
    "activations",
    "logits",
    "update",
    "host",
)


def as_markdown(found: AlignmentForecast) -> str:
    """Format the tables of memory and time, the assumptions, and what to change."""
    pruned, base, rows = found.pruned, found.base, found.rows
    first = rows[0]
    shown = [part for part in _PARTS if any(getattr(row.memory, part) for row in rows)]
    lines = [
        f"{pruned.parameters / GB:.2f}B parameters of {base.parameters / GB:.2f}B, "
        f"{pruned.trained / GB:.2f}B trained, {first.steps:,} steps; {first.work.total / GB:.1f} "
        f"GFLOP per token: forward {first.work.forward / GB:.1f}, backward "
        f"{first.work.backward / GB:.1f}, recomputed {first.work.recomputed / GB:.1f}"
        + (f", base {first.work.base / GB:.1f}" if first.work.base else ""),
        "",
        f"| GB per GPU | {' | '.join(shown)} | **peak** | {' | '.join(_stages(first))} |",
        "|---" * (len(shown) + 2 + len(first.by_stage)) + "|",
    ]
    for row in rows:
        parts = [f"{getattr(row.memory, part) / GB:.1f}" for part in shown]
        peaks = [f"{peak / GB:.1f}" for peak in row.by_stage.values()]
        lines.append(
            f"| {row.gpus} GPUs | {' | '.join(parts)} | **{row.memory.peak / GB:.1f}**"
            f"{'' if row.fits else ' does not fit'} | {' | '.join(peaks)} |"
        )
    lines += [
        "",
        "| GPUs | GB sent per step | compute | communication | offloading | step | hours | GPU "
        "hours | cost | MFU |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.gpus} | {row.traffic / GB:.0f} | {row.compute_s:.2f} s "
            f"| {row.traffic_s:.2f} s | {row.offload_s:.2f} s | **{row.step_s:.2f} s** "
            f"| **{row.hours:.2f}** | {row.hours * row.gpus:.1f} | **{row.cost:,.2f}** "
            f"| {row.mfu:.2f} |"
        )
    lines += ["", *_targets(rows), *_assumptions(found.assumed)]
    lines += [f"- {note}" for note in dict.fromkeys(note for row in rows for note in row.notes)]
    return "\n".join(lines) + "\n"


def _stages(row: Estimate) -> list[str]:
    return [f"ZeRO-{stage}" for stage in row.by_stage]


def _targets(rows: Sequence[Estimate]) -> list[str]:
    found = [
        f"| {row.gpus} | {row.targets.workers} | {row.targets.base / GB:.1f} "
        f"| {row.targets.hours:.2f} | {row.targets.cost:,.2f} | {row.targets.stored / GB:.1f} GB |"
        for row in rows
        if row.targets is not None
    ]
    if not found:
        return []
    head = (
        "| GPUs | copies of the base | GB of the base per GPU | hours | cost | storage, at most |"
    )
    return [
        "The base's pass for its most likely tokens, computed once:",
        "",
        head,
        "|---" * 6 + "|",
        *found,
        "",
    ]


def _assumptions(cluster: Cluster) -> list[str]:
    return [
        f"Assumed: {cluster.mfu:.0%} of the peak, {NVLINK / GB:.0f} GB/s between GPUs of a node, "
        f"{cluster.bandwidth / GB:.0f} GB/s of network per node, {cluster.price:g} per GPU hour. "
        "Checkpoints, evaluations and start-up are not included. ZeRO-3 overlaps communication "
        "with computation, so the longer of the two counts; ZeRO-0 to 2 add them. The peak must "
        f"be at most {GPU_MEMORY / GB:.0f} GB: weights, base and optimiser, and the larger of the "
        "backward pass (gradients to logits) and the update.",
    ]
