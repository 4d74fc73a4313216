"""loram init: writes a commented run file to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import yaml

from loram_ray.cli.tables import Debug
from loram_ray.config import RunConfig, validate
from loram_ray.errors import LoramError
from loram_ray.utils.files import write_atomic
from loram_ray.utils.parsing import parse_yaml
from loram_ray.utils.printing import show

HELP = """Write a commented run file to start from.

Example: loram init --base path/to/model --data train.jsonl --test test.jsonl

The file has a section for each stage. Without --text, the align section is commented out; without
--test, the evaluate section. Edit the file, then run loram plan and loram run.
"""

_TEMPLATE = """\
# LoRAM: train a LoRA on a pruned model, recover it, use it on the base model.
#
#   loram plan --config {file}   # parameters, memory and GPUs, before anything is loaded
#   loram run --config {file}    # all sections below, in order; run it again to resume
#
# Each section is also a command: loram prune --config {file}
# loram COMMAND --help lists all keys of a section with their defaults.

base: {base} # directory with safetensors files, or a Hugging Face Hub id
output: {output} # everything is written to this directory

prune:
  method: random # or magnitude, taylor, flap, ...; see loram prune --help
  ratio: 0.65 # share of each pruned layer to remove
  # layers: [4, 28] # default: all but the first 4 and the last 2

# Alignment trains the pruned model on general text, so that its predictions match the base's.
{align}
train:
  data: {data} # JSON Lines, CSV, Parquet or a dataset, with chats, instructions or text
  lora: {{r: 8, alpha: 16, dropout: 0.05}}
  steps: 400
  batch_size: 16
  micro_batch_size: 4 # examples per forward pass; fewer need less memory
  max_length: 512
  # eval_share: 0.05 # hold out examples, and keep the checkpoint with the lowest loss on them
  optimiser: {{learning_rate: 1.0e-4, warmup_steps: 10}}
  # precision: fp32 # on CPUs without bfloat16

recover: {{}} # the adapter for the base model, a plain PEFT LoRA

# merge: {{}} # merge the adapter into the base

# Perplexity of the answers in held-out rows.
{evaluate}
"""

_ALIGN = """\
align:
  corpus:
    sources: [{{path: {text}}}] # text files, JSON Lines or Parquet; several with weights
    sequence_length: 512
  steps: 400
  batch_size: 16
  micro_batch_size: 4
"""

_EVALUATE = """\
evaluate:
  data: {test}
"""


def init_command(
    base: Annotated[
        str, typer.Option("--base", help="Base model: a directory or a Hugging Face Hub id.")
    ],
    data: Annotated[str, typer.Option("--data", help="Rows to train on, as train.data.")],
    text: Annotated[
        str | None, typer.Option("--text", help="Text to align the pruned model on.")
    ] = None,
    test: Annotated[
        str | None, typer.Option("--test", help="Held-out rows to evaluate on.")
    ] = None,
    directory: Annotated[
        Path, typer.Option("--directory", help="Output directory of the run.")
    ] = Path("runs/mine"),
    output: Annotated[
        Path, typer.Option("--output", metavar="FILE", help="Run file to write.")
    ] = Path("run.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace the run file.")] = False,
    debug: Debug = False,
) -> None:
    """Write a commented run file to start from."""
    if output.exists() and not force:
        raise LoramError(
            f"--output must name a new file, but {output} exists; choose another or pass --force"
        )
    written = run_file(base, data, text, test, directory, output)
    validate(RunConfig, parse_yaml(written, str(output)), "loram init")
    write_atomic(output, written)
    show(f"init: done: {output}; edit it, then run loram plan --config {output}")


def run_file(
    base: str, data: str, text: str | None, test: str | None, directory: Path, file: Path
) -> str:
    """Return the text of a run file, with or without sections for alignment and evaluation."""
    align = _ALIGN.format(text=_scalar(text or "text.jsonl"))
    evaluate = _EVALUATE.format(test=_scalar(test or "test.jsonl"))
    return _TEMPLATE.format(
        file=file,
        base=_scalar(base),
        output=_scalar(str(directory)),
        data=_scalar(data),
        align=align if text is not None else _commented(align),
        evaluate=(evaluate if test is not None else _commented(evaluate)).rstrip(),
    )


def _scalar(text: str) -> str:
    """Return text as a one-line YAML scalar."""
    dumped: str = yaml.safe_dump([text], width=10**6, allow_unicode=True, default_flow_style=True)
    return dumped.strip()[1:-1]


def _commented(text: str) -> str:
    return "".join(f"# {line}\n" for line in text.splitlines())
