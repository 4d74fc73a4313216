"""Tasks over the cluster by Ray Data, of which those already done are left out."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from loram_ray.errors import LoramError
from loram_ray.runtime.progress import Reporter


def spread(
    label: str,
    unit: str,
    items: dict[Path, dict[str, Any]],
    task: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    """Call a task for each item whose file is not there yet, over the cluster, by Ray Data.

    Args:
        label: for the progress.
        unit: what an item is, for the progress.
        items: by the file that a task writes last.
        task: called with an item and the arguments.
        arguments: the same for all items.
    """
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its progress goes to its log file
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
    """Call a task for one item, in a Ray Data task."""
    item = {key: values.tolist()[0] for key, values in batch.items()}
    return failure_of(lambda: task(item, *arguments))


def failure_of(call: Callable[[], None]) -> dict[str, np.ndarray]:
    """Call, and return what the user can mend, as columns: Ray Data would hide what it was."""
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
    """Raise the first failure that came back in the columns of `failure_of`."""
    for number, message in zip(batch["errno"], batch["message"], strict=True):
        if message:
            raise LoramError(str(message))
        if number:
            raise OSError(int(number), os.strerror(number))
