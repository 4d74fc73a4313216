"""Format a forecast as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from rich.table import Table

from loram_ray.estimating.alignment import Estimate
from loram_ray.estimating.forecast import Forecast
from loram_ray.estimating.gpus import CONTEXT, GAPS, GPUS, Cluster, fitting
from loram_ray.estimating.memory_trace import TrainingMemory
from loram_ray.estimating.sizes import Sizes

_GB = 1e9
_OF_CLUSTERS = ("A10G", "L4", "A100 80 GB, H100")
_TRAINING = {
    "weights": "frozen weights",
    "adapter": "LoRA, float32",
    "optimiser": "AdamW's moments",
    "gradients": "gradients of the LoRA",
    "activations": "activations",
    "logits": "logits of one chunk",
    "workspace": "dequantised weights",
}


def tables(found: Forecast) -> Iterator[Table | str]:
    """Yield the tables and lines to print."""
    yield _sizes(found)
    yield _training(found)
    yield (
        f"The peak must fit into a GPU's memory minus {CONTEXT / _GB:.1f} GB for CUDA and "
        f"{GAPS:.0%} for fragmentation."
    )
    if found.alignment is not None:
        yield _alignment(found.alignment)
        yield from found.alignment.notes


def _sizes(found: Forecast) -> Table:
    table = Table(title=f"{found.prune.base} pruned at {found.prune.ratio or 'several ratios'}")
    table.add_column("")
    for column in ("parameters", "bf16", "NF4, nominal", "NF4, stored"):
        table.add_column(column, justify="right")
    for name, sizes in (("base", found.base), ("pruned", found.pruned)):
        table.add_row(name, f"{sizes.parameters / _GB:.2f} B", *_bytes(sizes))
    factors = [f"{factor:.2f}x" for factor in found.reductions().values()]
    table.add_row("base in bf16 / pruned", factors[0], *factors)
    return table


def _bytes(sizes: Sizes) -> Iterator[str]:
    return (f"{n / _GB:.2f} GB" for n in (sizes.bf16, sizes.nf4_nominal, sizes.nf4_stored))


def _training(found: Forecast) -> Table:
    train = found.train
    table = Table(
        title=f"Training a LoRA of rank {train.lora.r} on the pruned model: "
        f"{train.micro_batch_size} x {train.max_length} tokens per micro-batch"
    )
    table.add_column("GB per GPU")
    for column in ("in NF4", f"in {train.precision}"):
        table.add_column(column, justify="right")
    columns = (found.nf4, found.whole)
    for field in fields(TrainingMemory):
        amounts = (f"{getattr(memory, field.name) / _GB:.2f}" for memory in columns)
        table.add_row(_TRAINING[field.name], *amounts)
    table.add_section()
    table.add_row("peak", *(f"{memory.total / _GB:.2f}" for memory in columns))
    table.add_row("smallest GPU", *(_smallest(memory) for memory in columns))
    for gpu in (gpu for gpu in GPUS if gpu.name in _OF_CLUSTERS):
        counts = (str(memory.max_adapters(gpu.usable)) for memory in columns)
        table.add_row(f"adapters at a time, {gpu.name}", *counts)
        counts = (str(gpu.processes(memory.total)) for memory in columns)
        table.add_row(f"actors of one adapter, {gpu.name}", *counts)
    return table


def _smallest(memory: TrainingMemory) -> str:
    gpu = next(fitting(memory.total), None)
    return "none" if gpu is None else gpu.name


def _alignment(row: Estimate) -> Table:
    assumed = Cluster(row.gpus)
    table = Table(
        title=f"Alignment on {row.gpus} GPUs, at {assumed.mfu:.0%} of an H100's peak",
        caption="loram plan --alignment shows details and other clusters",
    )
    for column in ("GB per GPU", "per step", "steps", "hours", "GPU hours", "cost"):
        table.add_column(column, justify="right")
    table.add_row(
        f"{row.memory.peak / _GB:.1f}" + ("" if row.fits else " (does not fit)"),
        f"{row.step_s:.2f} s",
        f"{row.steps:,}",
        f"{row.hours:.2f}",
        f"{row.hours * row.gpus:.1f}",
        f"{row.cost:,.2f} at {assumed.price:g} per hour",
    )
    return table
