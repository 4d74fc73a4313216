"""The export stage: writes a base or merged model as one GGUF file."""

from __future__ import annotations

import importlib.util

from loram_ray.artifacts.stage_directory import (
    StageDirectory,
    StageResult,
    require_space,
    run_stage,
)
from loram_ray.config import ExportConfig, RayConfig
from loram_ray.errors import LoramError
from loram_ray.models.base import BaseModel
from loram_ray.models.gguf import Source, architecture_of, read_source, size_of, write_gguf
from loram_ray.runtime.progress import Reporter


def export(config: ExportConfig, ray_config: RayConfig | None = None) -> StageResult:
    """Write a model as GGUF, for llama.cpp and its derivatives, holding one tensor in memory.

    This stage runs in the calling process; ``ray_config`` is unused.

    Raises:
        LoramError: The model is pruned or quantised, llama.cpp does not support its family,
            computation or tokenizer, or the gguf package is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise LoramError("export needs the gguf package; pip install 'loram-ray[gguf]'")
    model = BaseModel.open(config.model, "export.model")
    for key, what in (("pruned_linears", "pruned"), ("quantization_config", "quantised")):
        if model.config.get(key) is not None:
            raise LoramError(
                f"export.model must be a base or merged model, but {model.directory} is {what}; "
                "run loram merge and use its output"
            )
    architecture_of(model.config["model_type"])
    source = read_source(model.directory, config.pre_tokenizer)
    digest, base_fingerprint = model.identify()
    return run_stage(
        config.output,
        "export",
        settings={
            "type": config.type,
            "pre_tokenizer": config.pre_tokenizer,
            "form": 3
            if source.slides
            else 2,  # form 2 records a context length that is too long for these
        },
        parents={"model": digest},
        base_fingerprint=base_fingerprint,
        write=lambda target: _write(target, config, source),
        reads=(model.directory,),
    )


def _write(target: StageDirectory, config: ExportConfig, source: Source) -> None:
    nbytes = size_of(source, config.type)
    require_space(target.path, nbytes)
    path = target.path / f"model-{config.type}.gguf"
    with Reporter("export", total=nbytes, unit="B") as reporter:
        write_gguf(source, path, config.type, reporter.advance)
    target.details.update(file=path.name, bytes=path.stat().st_size)
