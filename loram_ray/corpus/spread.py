"""Run tasks over the cluster with Ray Data, skipping those already done."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from loram_ray.errors import LoramError
from loram_ray.runtime.progress import Reporter


def map_items(
    label: str,
    unit: str,
    items: dict[Path, dict[str, Any]],
    task: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    """Call a task for each item whose result file does not exist yet, as Ray Data tasks.

    Args:
        label: Label of the progress line.
        unit: Unit of the progress line.
        items: Items by result file, which the task writes last.
        task: Function called with an item and `arguments`.
        arguments: Further arguments of the task.
    """
    import ray.data

    logging.getLogger("ray.data").setLevel(
        logging.ERROR
    )  # Ray Data reports progress in its log file
    pending = [item for path, item in items.items() if not path.exists()]
    with Reporter(label, total=len(items), unit=unit) as reporter:
        reporter.update(len(items) - len(pending), {})
        if not pending:
            return
        dataset = ray.data.from_items(pending, override_num_blocks=len(pending)).map_batches(
            _call, fn_args=(task, arguments), batch_size=1, num_cpus=1
        )
        for batch in dataset.iter_batches(batch_size=None):
            raise_failures(batch)
            reporter.advance(len(batch["errno"]))


def _call(
    batch: dict[str, np.ndarray], task: Callable[..., None], arguments: tuple[Any, ...]
) -> dict[str, np.ndarray]:
    """Call the task for one item, inside a Ray Data task."""
    item = {key: values.tolist()[0] for key, values in batch.items()}
    return failure_of(lambda: task(item, *arguments))


def failure_of(call: Callable[[], None]) -> dict[str, np.ndarray]:
    """Call a function and return user-fixable errors as columns; Ray Data would hide their type."""
    number, message = 0, ""
    try:
        call()
    except LoramError as error:
        message = str(error)
    except OSError as error:
        if error.errno is None:
            raise
        number = error.errno
    return {"errno": np.array([number]), "message": np.array([message])}


def raise_failures(batch: dict[str, np.ndarray]) -> None:
    """Raise the first failure in the columns that `failure_of` returned."""
    for number, message in zip(batch["errno"], batch["message"], strict=True):
        if message:
            raise LoramError(str(message))
        if number:
            raise OSError(int(number), os.strerror(number))
