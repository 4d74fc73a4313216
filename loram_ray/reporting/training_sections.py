"""Report sections on training: losses, throughput, memory, pruning and restarts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy
import torch

from loram_ray.plan import PruningPlan
from loram_ray.reporting.figures import Curve, Draw, curves, figure_of, heat
from loram_ray.reporting.figures import memory as memory_bars
from loram_ray.reporting.parts import Part, Table
from loram_ray.reporting.results import Results
from loram_ray.runtime.progress import HELD_OUT, restarts_in

_BINS = 64


def _measured(results: Results, key: str) -> dict[str, list[Curve]]:
    """Collect the curves of a metric, by kind of stage."""
    curves_of: dict[str, list[Curve]] = {}

    def add(kind: str, name: str, lines: Sequence[dict[str, Any]]) -> None:
        some = [
            (line["step"], line[key]) for line in lines
            if isinstance(line.get(key), int | float) and math.isfinite(line[key])
        ]  # fmt: skip
        if some:
            steps, values = zip(*some, strict=True)
            curves_of.setdefault(kind, []).append(Curve(name, steps, values))

    for stage in results.stages:
        if stage.manifest.stage in ("align", "train"):
            add(stage.manifest.stage, stage.name, stage.metrics)
    for unfinished in results.unfinished:
        add("unfinished", unfinished.name, unfinished.metrics)
    for name, lines in results.metrics_of_tasks:
        add("train", name, lines)
    return curves_of


def losses(results: Results) -> Part | None:
    """Plot losses by step; None without content, as for all sections."""
    part = Part("Losses", "In nats per token.")
    keys = {"loss": "training loss", "eval_loss": "held-out loss"}
    for stage in results.stages:
        if stage.manifest.stage == "align":
            keys |= {
                key: f"held-out loss on {key.removeprefix(HELD_OUT)}"
                for line in stage.metrics
                for key in line
                if key.startswith(HELD_OUT)
            }
    for key, label in keys.items():
        for kind, some in _measured(results, key).items():
            part.figures.append(
                figure_of(
                    f"{key}-{kind}",
                    f"{label.capitalize()}: {kind}",
                    f"{len(some):,} curves." if len(some) > 1 else some[0].name,
                    partial(curves, lines=some, label=label),
                )
            )
    return part if part.figures else None


def speed(results: Results) -> Part | None:
    """Plot tokens and examples per second."""
    part = Part("Throughput", "By step.")
    for key, label in (("tokens_per_s", "tokens/s"), ("examples_per_s", "examples/s")):
        for kind, some in _measured(results, key).items():
            draw = partial(curves, lines=some, label=label)
            part.figures.append(
                figure_of(f"{key}-{kind}", f"{label}: {kind}", "Higher is faster.", draw)
            )
    return part if part.figures else None


def memory(results: Results) -> Part | None:
    """Plot the peak memory of trainings."""
    peaks = [
        (curve.name, max(curve.values))
        for some in _measured(results, "memory_gb").values()
        for curve in some
    ]
    if not peaks:
        return None
    shown = sorted(peaks, key=lambda peak: -peak[1])[:20]
    figure = figure_of(
        "memory",
        "Peak memory",
        "GPU memory, or process memory without a GPU. Dashed lines are the next larger GPUs.",
        partial(memory_bars, peaks=shown),
        size=(7.0, 1.0 + 0.3 * len(shown)),
    )
    more = f" The {len(shown)} largest of {len(peaks):,}." if len(peaks) > len(shown) else ""
    return Part("Memory", f"Peak of each training.{more}", figures=[figure])


def kept(results: Results) -> Part | None:
    """Plot heat maps of the weights that pruning kept, for each plan."""
    part = Part("Kept by pruning", "Layers that were not pruned are kept completely.")
    seen = set()
    for stage in results.stages:
        plan = PruningPlan.load_if_any(stage.directory) if stage.manifest.stage == "prune" else None
        if plan is None or plan.digest in seen:
            continue
        seen.add(plan.digest)
        for name, title, draw in heats(plan):
            part.figures.append(
                figure_of(
                    f"{name}-{stage.name.replace('/', '-')}",
                    f"{title}: {stage.name}",
                    f"{plan.method}, ratio {plan.ratio:g}.",
                    draw,
                )
            )
        if len(seen) == 6:
            part.says += " The first six plans."
            break
    return part if part.figures else None


def heats(plan: PruningPlan) -> Iterator[tuple[str, str, Draw]]:
    """Yield name, title and drawing of each heat map of a plan."""
    geometry = plan.geometry
    if plan.masks is not None:
        kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in plan.masks.shapes))
        shares = numpy.ones((geometry.num_layers, len(kinds)))
        for module in plan.masks.shapes:
            layer = next(int(part) for part in module.split(".") if part.isdecimal())
            column = kinds.index(module.rpartition(".")[2])
            shares[layer, column] = float(plan.masks.read(module).float().mean())
        yield (
            "weights",
            "Weights",
            partial(heat, shares=shares, names=("layer", f"linear ({', '.join(kinds)})")),
        )
        return
    for unit in plan.architecture.units:
        *_, count = unit.shape(geometry)
        bins = min(_BINS, count)
        shares = numpy.ones((geometry.num_layers, bins))
        size = torch.bincount(torch.arange(count) * bins // count, minlength=bins)
        for layer, units in plan.layers.items():
            index = units[unit.name]
            kept = torch.bincount(index.flatten() * bins // count, minlength=bins)
            shares[layer] = (kept / (size * (index.numel() // index.shape[-1]))).numpy()
        title = unit.title[0].upper() + unit.title[1:]
        label = f"{unit.title}, {bins} bins of their indices" if bins < count else unit.title
        yield unit.name, title, partial(heat, shares=shares, names=("layer", label))


def faults(results: Results) -> Part | None:
    """Show the restarts of trainings and tasks."""
    rows = [
        (stage.name, count) for stage in results.stages if (count := restarts_in(stage.metrics))
    ]
    rows += [(row["name"], row["deaths"]) for row in results.rows if row.get("deaths")]
    if not rows:
        return None
    total = sum(count for _, count in rows)
    says = f"{total:,} restarts, each from the last checkpoint."
    shown = [[name, str(count)] for name, count in rows]
    return Part("Restarts", says, tables=[Table(("training", "restarts"), shown)])
