"""The table of commands, shared by the command line, ``loram submit``, run files and Python.

A new command needs a row here, a section in ``config`` and a function. Both are given as dotted
paths below ``loram_ray``, so that reading the table imports nothing.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

PIPELINE, STUDIES, SHARING = "Pipeline", "Many trainings", "Sharing"


@dataclass(frozen=True)
class Command:
    """A command, which is also a section of a run file and a function ``name(section, ray)``.

    Attributes:
        name: Name on the command line.
        section: Dotted path of the pydantic model that holds its settings.
        function: Dotted path of the function that does the work.
        panel: Heading in ``loram --help``.
        example: Arguments of a typical call.
        uses_ray: Whether the command starts or joins Ray.
        reads: Other sections of a run file that the command reads.
        printer: Dotted path of the function that prints the result.
        preview: Dotted path of the function that ``--preview N`` calls instead, if the command has
            this option.
    """

    name: str
    section: str
    function: str
    panel: str
    example: str
    uses_ray: bool = False
    reads: tuple[str, ...] = ()
    printer: str = "cli.results.show_stage"
    preview: str = ""

    @property
    def section_name(self) -> str:
        """Name of the section's model, e.g. ``PruneConfig``."""
        return self.section.rpartition(".")[2]

    @property
    def model(self) -> Any:
        """The section's pydantic model."""
        return imported(self.section)

    def __call__(self, section: Any, ray_config: Any = None) -> Any:
        """Run the command."""
        return imported(self.function)(section, ray_config)


COMMANDS = (
    Command(
        name="run",
        section="config.run.RunConfig",
        function="stages.run.run",
        panel=PIPELINE,
        example="--config jobs/configs/demo.yaml",
        uses_ray=True,
        printer="cli.results.show_run",
    ),
    Command(
        name="prune",
        section="config.prune.PruneConfig",
        function="stages.prune.prune",
        panel=PIPELINE,
        example="--base base --output pruned --ratio 0.5 --method magnitude",
        uses_ray=True,
    ),
    Command(
        name="align",
        section="config.align.AlignConfig",
        function="stages.align.align",
        panel=PIPELINE,
        example="--config jobs/configs/demo.yaml --workers 1",
        uses_ray=True,
    ),
    Command(
        name="train",
        section="config.train.TrainConfig",
        function="stages.train.train",
        preview="cli.preview.show_examples",
        panel=PIPELINE,
        example="--model pruned --data data.jsonl --output adapter_pruned --lora.r 16",
        uses_ray=True,
    ),
    Command(
        name="recover",
        section="config.finetune.RecoverConfig",
        function="stages.recover.recover",
        panel=PIPELINE,
        example="--adapter adapter_pruned --base base --output adapter",
    ),
    Command(
        name="merge",
        section="config.finetune.MergeConfig",
        function="stages.merge.merge",
        panel=PIPELINE,
        example="--base base --adapter adapter --output merged",
    ),
    Command(
        name="evaluate",
        section="config.evaluate.EvaluateConfig",
        function="stages.evaluate.evaluate",
        panel=PIPELINE,
        example="--model base --adapter adapter --data test.jsonl --output scores",
        uses_ray=True,
        printer="cli.results.show_scores",
    ),
    Command(
        name="batch",
        section="config.batch.BatchConfig",
        function="studies.batch.batch",
        panel=STUDIES,
        example="--config jobs/configs/batch.yaml",
        uses_ray=True,
        reads=("train",),
        printer="cli.results.show_tasks",
    ),
    Command(
        name="sweep",
        section="config.sweep.SweepConfig",
        function="studies.sweep.sweep",
        panel=STUDIES,
        example="--config jobs/configs/sweep.yaml",
        uses_ray=True,
        reads=("prune", "align", "train"),
        printer="cli.results.show_trials",
    ),
    Command(
        name="compare",
        section="config.compare.CompareConfig",
        function="studies.compare.compare",
        panel=STUDIES,
        example="--config jobs/configs/compare.yaml",
        uses_ray=True,
        reads=("prune", "align", "train", "recover", "evaluate"),
        printer="cli.results.show_systems",
    ),
    Command(
        name="quantize",
        section="config.publish.QuantizeConfig",
        function="stages.quantize.quantize",
        panel=SHARING,
        example="--model aligned --output quantized",
    ),
    Command(
        name="export",
        section="config.publish.ExportConfig",
        function="stages.export.export",
        panel=SHARING,
        example="--model merged --output gguf --type q8_0",
    ),
    Command(
        name="publish",
        section="config.publish.PublishConfig",
        function="stages.publish.publish",
        panel=SHARING,
        example="--directory quantized --repo my-organisation/my-model",
        printer="cli.results.show_publication",
    ),
)
"""All commands, in the order of the help."""

COMMAND_OF = {command.name: command for command in COMMANDS}
SECTIONS_OF_A_RUN = tuple(name for name in COMMAND_OF if name != "run")


def imported(path: str) -> Any:
    """Import and return the object at a dotted path below ``loram_ray``."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"loram_ray.{module}"), name)


def command_of(section: Any) -> Command:
    """Return the command that a section belongs to.

    Raises:
        TypeError: No command accepts the section.
    """
    name = type(section).__name__
    for command in COMMANDS:
        if command.section_name == name:
            return command
    raise TypeError(f"no command takes {name}")
