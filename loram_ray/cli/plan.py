"""loram plan: what a run file needs, before anything is downloaded."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loram_ray.cli.tables import AsJson, Config, Debug, Overrides, console, print_json
from loram_ray.errors import LoramError
from loram_ray.estimating.gpus import Cluster

if TYPE_CHECKING:
    from loram_ray.estimating.forecast import AlignmentForecast

HELP = """Estimate what a run file needs: parameters, memory, GPUs and the cost of alignment.

Example: loram plan --config jobs/configs/llama-3.1-70b.yaml --set prune.ratio=0.95

Prints the parameters and bytes of the base and of the pruned model in bf16 and NF4 (nominal: four
bits per parameter, as in the paper; stored: as quantize writes them, with embeddings and lm_head in
bf16), a breakdown of the peak memory of training, the GPUs with enough memory, and the cost of
alignment. Only the base's config.json is read. If the run file has no train section, the defaults
apply, with activation checkpointing and LoRA on lm_head as in the paper.

With --alignment, prints only the alignment, in detail: memory per GPU, time per step, hours and
cost for each number of GPUs. Times are computed from --mfu and --bandwidth, not measured. If the
recipe does not fit into 80 GB, the output names settings that do.
"""

BaseConfig = Annotated[
    Path | None,
    typer.Option(
        "--base-config",
        help="The base's config.json, or a directory that contains it, if the base is not "
        "available.",
    ),
]
Alignment = Annotated[
    bool, typer.Option("--alignment", help="Print only the alignment, in detail.")
]
Gpus = Annotated[
    str | None,
    typer.Option(
        "--gpus",
        help="Comma-separated numbers of GPUs to compare, e.g. 8,16,64. Default: align.workers. "
        "Needs --alignment.",
    ),
]
Mfu = Annotated[
    float,
    typer.Option(
        "--mfu",
        help="Achieved share of the GPUs' peak bf16 FLOPS, including recomputation; 0.3 to 0.5 is "
        "typical. Needs --alignment.",
    ),
]
Bandwidth = Annotated[
    float,
    typer.Option(
        "--bandwidth",
        help="Network bandwidth of a node in each direction, in GB/s. Needs --alignment.",
    ),
]
Price = Annotated[
    float,
    typer.Option("--price", help="Price of a GPU hour, in any currency. Needs --alignment."),
]
_OF_ALIGNMENT = ("gpus", "mfu", "bandwidth", "price")


def plan_command(
    context: typer.Context,
    config: Config = None,
    overrides: Overrides = None,
    base_config: BaseConfig = None,
    alignment: Alignment = False,
    gpus: Gpus = None,
    mfu: Mfu = Cluster.mfu,
    bandwidth: Bandwidth = Cluster.bandwidth / 1e9,
    price: Price = Cluster.price,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Print what a recipe will need."""
    from loram_ray.estimating.forecast import forecast, forecast_alignment
    from loram_ray.estimating.tables import tables

    if alignment:
        counts, assumed = _counts(gpus), Cluster(1, mfu, bandwidth * 1e9, price)
        estimates = forecast_alignment(
            config, overrides or (), base_config, gpus=counts, assumed=assumed
        )
        _print_alignment(estimates, as_json)
        return
    _refuse_options_of_alignment(context)
    planned = forecast(config, overrides or (), base_config)
    if as_json:
        print_json(planned.as_json())
        return
    out = console(120)
    for part in tables(planned):
        out.print(part)


def _refuse_options_of_alignment(context: typer.Context) -> None:
    """Raise an error if an option was given that only ``--alignment`` reads."""
    sources = {name: context.get_parameter_source(name) for name in _OF_ALIGNMENT}
    given = [f"--{name}" for name, source in sources.items() if source and source.name != "DEFAULT"]
    if given:
        raise LoramError(
            f"{', '.join(given)} must be given with --alignment, got no --alignment; add it, or "
            f"leave out {', '.join(given)}"
        )


def _counts(gpus: str | None) -> list[int]:
    """Parse the numbers of ``--gpus``."""
    try:
        return [int(count) for count in gpus.split(",")] if gpus else []
    except ValueError:
        raise LoramError(
            f"--gpus must be whole numbers separated by commas, got {gpus}; e.g. --gpus 8,16"
        ) from None


def _print_alignment(forecast: AlignmentForecast, as_json: bool) -> None:
    from loram_ray.estimating.alignment_tables import as_markdown

    if as_json:
        print_json({"estimates": [asdict(row) for row in forecast.rows]})
    else:
        print(as_markdown(forecast), end="")
