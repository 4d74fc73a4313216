"""Drive alignment with Ray Train, from the first step to the last."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from loram_ray.alignment.atomic_filesystem import atomic_local_filesystem
from loram_ray.alignment.checkpoints import (
    remove_staging,
    step_of,
)
from loram_ray.alignment.loop import LoopSettings
from loram_ray.artifacts.disk import FULL, full_disk
from loram_ray.errors import LoramError
from loram_ray.runtime.interruption import handlers_kept
from loram_ray.runtime.progress import METRICS_FILE, Reporter, follow, last_step
from loram_ray.runtime.tracking import tracking


def fit(loop: LoopSettings) -> None:
    """Train to the last step, resuming from the last checkpoint if there is one.

    Failed workers and lost nodes are replaced; metrics are shown and tracked throughout.

    Raises:
        LoramError: For mistakes the user can fix, which are not retried.
        ray.train.TrainingFailedError: If workers fail more often than allowed.
    """
    import ray.train

    from loram_ray.alignment.trainer import ABORTING, mistake_in, trainer_of

    config, trainer = loop.config, trainer_of(loop)
    ended = threading.Event()
    settings = config.model_dump(mode="json")
    with (
        Reporter("align", total=config.total_steps, unit="step") as reporter,
        tracking(config.trackers, "align", config.output, loop.work, settings) as tracked,
    ):
        watcher = threading.Thread(
            target=follow, args=(reporter, loop.work / METRICS_FILE, ended.wait, tracked)
        )
        watcher.start()
        try:
            with handlers_kept():
                trainer.fit()
        except KeyboardInterrupt:
            trainer.abort()
            raise
        except ray.train.TrainingFailedError as error:
            failures = getattr(error, "worker_failures", {}).values()
            mistake = mistake_in([*failures, getattr(error, "controller_failure", None)])
            raise mistake or _full_disk_of(error, loop) or error from error
        finally:
            ended.set()
            watcher.join()
            remove_staging(loop.storage, config.staging_dir, ABORTING)


def _full_disk_of(error: Any, loop: LoopSettings) -> LoramError | None:
    """Return the error to raise if Ray Train itself ran out of disk space."""
    import ray.train

    from loram_ray.alignment.trainer import last_good

    failure = getattr(error, "controller_failure", None)
    if not isinstance(failure, OSError) or failure.errno not in FULL:
        return None
    try:
        last = ray.train.Result.from_path(str(loop.storage), atomic_local_filesystem()).checkpoint
    except RuntimeError:  # Ray Train has not listed the checkpoints yet
        last = None
    complete = {step_of(Path(last.path)): last.path} if last is not None else {}
    step = last_step(loop.work / METRICS_FILE)
    return LoramError(f"{full_disk('align', loop.storage, step)}; {last_good(complete, step)}")
