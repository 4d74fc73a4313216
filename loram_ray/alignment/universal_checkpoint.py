"""Convert checkpoints for another number of workers (DeepSpeed's universal checkpoints)."""

from __future__ import annotations

import contextlib
import io
import shutil
from argparse import Namespace
from pathlib import Path

from loram_ray.artifacts.manifest import write_json

_WORKERS_FILE = "workers.json"


def write_worker_count(checkpoint: Path, workers: int) -> None:
    """Record the number of workers beside a checkpoint."""
    write_json(checkpoint / _WORKERS_FILE, workers)


def read_worker_count(checkpoint: Path) -> int:
    """Return the number of workers that wrote a checkpoint."""
    from loram_ray.utils.parsing.documents import read_as

    return read_as(checkpoint / _WORKERS_FILE, int, remedy=f"remove {checkpoint}")


def make_universal(checkpoint: Path, tag: str, target: Path) -> None:
    """Convert a checkpoint atomically; an existing conversion is kept.

    Args:
        checkpoint: Directory with the parts of all workers under ``tag``.
        tag: Name of the state in the checkpoint, and in ``target``.
        target: Directory to write; load it with ``checkpoint.load_universal``.
    """
    from deepspeed.checkpoint import ds_to_universal

    if target.exists():
        return
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / tag).mkdir(parents=True)
    arguments = Namespace(
        input_folder=str(checkpoint / tag),
        output_folder=str(partial / tag),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(arguments)
    partial.rename(target)
