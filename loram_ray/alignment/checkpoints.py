"""Checkpoints of alignment: written to the worker's own disk, copied to the run's meanwhile."""

from __future__ import annotations

import errno
import hashlib
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from loram_ray.alignment.reshape import make_universal, note_workers, workers_of
from loram_ray.errors import LoramError

TAG = "state"
FOLDER = "checkpoints"
"""Of the run's work directory; Ray Train's name for the run."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Progress:
    """How far training is.

    Attributes:
        steps: optimiser steps done.
        seconds: spent on them, over all attempts; what was lost with a worker is not counted.
    """

    steps: int
    seconds: float


@contextmanager
def last_checkpoint(work: Path, worker: int, workers: int) -> Iterator[tuple[Path | None, bool]]:
    """Have the run's last checkpoint, and whether it was made universal for these workers."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None, False
        return
    with checkpoint.as_directory() as directory:
        found = Path(directory)
        if workers_of(found) == workers:
            yield found, False
            return
        universal = work / "universal" / Path(checkpoint.path).name
        if worker == 0:
            make_universal(found, TAG, universal)
        torch.distributed.barrier()
        yield universal, True


class Checkpoints:
    """Saves one worker's parts of a run's checkpoints.

    Training stands still while DeepSpeed writes to the worker's own disk. The copy to the run's
    storage goes on beside the next steps, and the next checkpoint waits for it, so that at most one
    is waiting on that disk.

    Args:
        work: the run's work directory.
        worker: number of the worker.
        resumed_at: steps of the checkpoint that was loaded; 0 without one.
        staging: folder on the worker's own disk, the system's temporary one by default.
    """

    def __init__(
        self, work: Path, worker: int, resumed_at: int, staging: Path | None = None
    ) -> None:
        self._storage = work / FOLDER
        run = hashlib.sha256(str(work).encode()).hexdigest()[:16]
        parent = staging or Path(tempfile.gettempdir())
        self._staging = parent / f"loram-ray-{run}" / str(worker)
        self._worker = worker
        self._saved = [resumed_at] if resumed_at else []
        self._copied = threading.Event()
        self._copied.set()
        shutil.rmtree(self._staging, ignore_errors=True)  # of an attempt that was killed
        if worker == 0:
            self._remove_unfinished(resumed_at)

    def save(self, engine: Any, progress: Progress, loss: float) -> float:
        """Save, after the copy of the checkpoint before; every worker must call it.

        Returns:
            Seconds in which training stood still.

        Raises:
            LoramError: the disk is full.
        """
        import ray.train

        started = time.perf_counter()
        self._copied.wait()
        step = progress.steps
        local = self._staging / f"step-{step}"
        with self._naming_full_disks(step, self._staging, local):
            local.mkdir(parents=True)
            engine.save_checkpoint(
                str(local), tag=TAG, client_state=asdict(progress), exclude_frozen_parameters=True
            )
            if self._worker == 0:
                note_workers(local, engine.world_size)
        self._copied.clear()
        ray.train.report(
            {"step": step, "loss": loss},
            checkpoint=ray.train.Checkpoint.from_directory(local),
            checkpoint_dir_name=f"step-{step:08d}-{time.time_ns()}",  # the first worker's counts
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=self._copy,
        )
        self._saved.append(step)
        return time.perf_counter() - started

    def finish(self) -> None:
        """Wait for the last copy."""
        self._copied.wait()
        shutil.rmtree(self._staging, ignore_errors=True)

    def good_before(self, step: int) -> str:
        """Name the last checkpoint whose weights are known to be good, if ``step`` has failed.

        That of the step just before may hold what made it fail.
        """
        good = [saved for saved in self._saved if saved < step - 1]
        if not good:
            return "there is no good checkpoint before it"
        found = sorted(self._storage.glob(f"step-{good[-1]:08d}-*"))
        return f"the last good checkpoint is {found[-1] if found else f'that of step {good[-1]}'}"

    def _copy(self, checkpoint: Any, name: str) -> Any:
        """Copy to the run's storage; called by Ray Train in a thread."""
        import ray.train

        storage = ray.train.get_context().get_storage()
        step = Path(checkpoint.path).name.removeprefix("step-")
        try:
            with self._naming_full_disks(int(step), self._storage, self._storage / name):
                return storage.persist_current_checkpoint(checkpoint, name)
        finally:
            self._copied.set()

    @contextmanager
    def _naming_full_disks(self, step: int, where: Path, partial: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:
            # torch writes in C++, and says neither errno nor the reason
            full = getattr(error, "errno", None) in _FULL or "PytorchStreamWriter" in str(error)
            shutil.rmtree(partial, ignore_errors=True)
            if not full:
                raise
            kept = [saved for saved in self._saved if saved < step]
            raise LoramError(
                f"align: the disk of {where} is full, the checkpoint of step {step} cannot be "
                f"written; {f'that of step {kept[-1]}' if kept else 'what was complete'} is kept, "
                "free some space and run the same command again"
            ) from error

    def _remove_unfinished(self, resumed_at: int) -> None:
        """Remove what an attempt that was killed had not finished copying."""
        for path in self._storage.glob("step-*"):
            if int(path.name.split("-")[1]) > resumed_at:
                shutil.rmtree(path, ignore_errors=True)
