"""What an alignment needs, before a GPU is rented: memory, hours and cost from shapes alone.

    python jobs/estimate_alignment.py --config jobs/configs/llama-3.1-70b.yaml --gpus 8 16 64

Only the base's config.json is read: from ``prune.base``, a directory or a hub id, or from
``--base-config``. Bytes are those that DeepSpeed keeps, from the shapes of the pruned model, which
is built without weights. Seconds are arithmetic, too, on assumptions that the table repeats:

--mfu         share of the GPUs' bf16 peak (989 TFLOP/s, an H100's; align.peak_tflops is another's)
              that everything computed reaches, recomputed activations and the base's forward pass
              among it; 0.3 to 0.5 is usual. What training would log as mfu is lower where anything
              is recomputed or waited for, and is in the table.
--bandwidth   GB/s of a node's network, each way. GPUs of one node (8) have NVLink.
--price       of a GPU for an hour, in any currency.

A setting that the recipe does not have can be tried: ``--set align.zero_stage=2``. A row that does
not fit 80 GB says what would.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from loram_ray.alignment.deepspeed_config import read_user_config
from loram_ray.config.load import load_run, section_of
from loram_ray.errors import LoramError
from loram_ray.estimating.alignment import GB, GPU_MEMORY, Cluster, Estimate, estimate
from loram_ray.estimating.base_configs import base_config
from loram_ray.estimating.flops import NVLINK
from loram_ray.estimating.shapes import ModelShapes, shapes_of

PARTS = (
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


def as_markdown(
    pruned: ModelShapes, base: ModelShapes, rows: Sequence[Estimate], cluster: Cluster
) -> str:
    """Tables of memory and of time, the assumptions, and what to change."""
    first = rows[0]
    shown = [part for part in PARTS if any(getattr(row.memory, part) for row in rows)]
    lines = [
        f"{pruned.parameters / GB:.2f}B parameters of {base.parameters / GB:.2f}B, "
        f"{pruned.trained / GB:.2f}B trained, {first.steps:,} steps; "
        f"{first.work.total / GB:.1f} GFLOP a token: forward {first.work.forward / GB:.1f}, "
        f"backward {first.work.backward / GB:.1f}, recomputed {first.work.recomputed / GB:.1f}"
        + (f", base {first.work.base / GB:.1f}" if first.work.base else ""),
        "",
        f"| GB of a GPU | {' | '.join(shown)} | **peak** | {' | '.join(_stages(first))} |",
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
        "| GPUs | GB sent in a step | computing | sending | offloading | step | hours | GPU hours "
        "| cost | mfu |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.gpus} | {row.traffic / GB:.0f} | {row.compute_s:.2f} s "
            f"| {row.traffic_s:.2f} s | {row.offload_s:.2f} s | **{row.step_s:.2f} s** "
            f"| **{row.hours:.2f}** | {row.hours * row.gpus:.1f} | **{row.cost:,.2f}** "
            f"| {row.mfu:.2f} |"
        )
    lines += ["", *_targets(rows), *_assumptions(cluster)]
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
    head = "| GPUs | copies of the base | its GB on a GPU | hours | cost | stored, at most |"
    return [
        "The base's pass for its likeliest tokens, once:",
        "",
        head,
        "|---" * 6 + "|",
        *found,
        "",
    ]


def _assumptions(cluster: Cluster) -> list[str]:
    return [
        f"Assumed: {cluster.mfu:.0%} of the peak, {NVLINK / GB:.0f} GB/s between GPUs of a node, "
        f"{cluster.bandwidth / GB:.0f} GB/s of network a node, {cluster.price:g} for a GPU hour; "
        "checkpoints, evaluations and start-up not counted. ZeRO-3 overlaps sending with "
        "computing, so the longer counts; ZeRO-0 to 2 add them. Peak is to be at most "
        f"{GPU_MEMORY / GB:.0f} GB: weights, base and optimiser, and the larger of the backward "
        "pass (gradients to logits) and the update.",
    ]


def main() -> None:
    """Print the tables, or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="run file with prune and align")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8], help="one row for each")
    parser.add_argument("--base-config", type=Path, help="the base's config.json, or its directory")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override")
    parser.add_argument("--mfu", type=float, default=Cluster.mfu, help="default %(default)s")
    parser.add_argument(
        "--bandwidth", type=float, default=Cluster.bandwidth / GB, help="default %(default)s"
    )
    parser.add_argument("--price", type=float, default=Cluster.price, help="default %(default)s")
    parser.add_argument("--json", action="store_true", help="bytes, seconds and hours for machines")
    arguments = parser.parse_args()
    try:
        _require(arguments)
        print(_estimates(arguments), end="")
    except LoramError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _require(arguments: argparse.Namespace) -> None:
    rules = {
        "--gpus": (min(arguments.gpus) >= 1, "at least 1", arguments.gpus),
        "--mfu": (0 < arguments.mfu <= 1, "above 0 and at most 1", arguments.mfu),
        "--bandwidth": (arguments.bandwidth > 0, "above 0 GB/s", arguments.bandwidth),
        "--price": (arguments.price >= 0, "at least 0", arguments.price),
    }
    for name, (holds, rule, value) in rules.items():
        if not holds:
            raise LoramError(f"{name} must be {rule}, got {value}; change it")


def _estimates(arguments: argparse.Namespace) -> str:
    run = load_run(arguments.config, arguments.set)
    prune, align = section_of(run, "prune"), section_of(run, "align")
    pruned, base = shapes_of(base_config(prune.base, arguments.base_config), prune, align.frozen)
    clusters = [
        Cluster(gpus, arguments.mfu, arguments.bandwidth * GB, arguments.price)
        for gpus in arguments.gpus
    ]
    users = read_user_config(align.deepspeed)
    rows = [estimate(align, users, pruned, base, cluster) for cluster in clusters]
    if arguments.json:
        return json.dumps({"estimates": [asdict(row) for row in rows]}, indent=1) + "\n"
    return as_markdown(pruned, base, rows, clusters[0])


if __name__ == "__main__":
    main()
