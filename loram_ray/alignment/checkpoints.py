"""Checkpoints of alignment: written to the worker's own disk, copied to the run's meanwhile."""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from loram_ray.alignment.universal_checkpoint import make_universal, note_workers, workers_of
from loram_ray.artifacts.disk import full_disk, is_full
from loram_ray.errors import LoramError
from loram_ray.runtime.scratch import remove_abandoned, temporary_directory

TAG = "state"
_STAGING = "loram-staging-"
_ON_NVME = "offloaded_tensors"  # in DeepSpeed's checkpoints


@dataclass(frozen=True)
class Progress:
    """How far training is.

    Attributes:
        steps: optimiser steps done.
        seconds: spent on them, over all attempts; what was lost with a worker is not counted.
    """

    steps: int
    seconds: float


def staging_prefix(storage: Path) -> str:
    """Begins the names of the folders that a run's workers write their parts to first."""
    return f"{_STAGING}{hashlib.sha256(str(storage).encode()).hexdigest()[:16]}-"


def remove_staging(storage: Path, staging: Path | None, seconds: float) -> None:
    """Remove what workers that have been killed left on this machine.

    Args:
        storage: Ray Train's folder of the run.
        staging: where their folders are; default: the system's directory for temporary files.
        seconds: to wait for workers that are about to end.
    """
    until = time.monotonic() + seconds
    parent = staging or temporary_directory()
    while remove_abandoned(staging_prefix(storage), parent) and time.monotonic() < until:
        time.sleep(0.1)
    remove_abandoned(_STAGING, parent)  # also of other runs, whose drivers were killed


class FailedStep(LoramError):
    """A step that cannot be done, for a reason that the user can mend.

    Attributes:
        good_until: the last step whose weights are not in doubt.
    """

    def __init__(self, message: str, good_until: int) -> None:
        super().__init__(message)
        self.good_until = good_until

    def __reduce__(self) -> tuple[type[FailedStep], tuple[str, int]]:
        return type(self), (str(self), self.good_until)


@contextmanager
def naming_full_disks(step: int, where: Path) -> Iterator[None]:
    """Tell a full disk from other errors.

    Raises:
        FailedStep: there is no space left.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not is_full(error, where):
            raise
        raise FailedStep(full_disk("align", where, step), step - 1) from error


def last_checkpoint(work: Path, worker: int, workers: int) -> tuple[Path | None, bool]:
    """Return the run's last checkpoint, and whether it was made universal for these workers.

    Raises:
        LoramError: other workers wrote it, of an optimiser on NVMe, which DeepSpeed cannot convert.
    """
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None, False
    found = Path(checkpoint.path)  # on storage that all workers share
    if workers_of(found) == workers:
        return found, False
    if (found / TAG / _ON_NVME).is_dir():
        raise LoramError(
            f"align.workers must be {workers_of(found)}, as when {found.name} was saved, where "
            f"align.offload_optimiser is nvme, got {workers}; go on with as many"
        )
    universal = work / "universal" / found.name
    if worker == 0:
        make_universal(found, TAG, universal)
    torch.distributed.barrier()
    return universal, True


def complete_checkpoints(storage: Path) -> dict[int, str]:
    """The checkpoints of earlier attempts, by their steps."""
    return {step_of(path): str(path) for path in storage.glob("step-*")}


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.name.split("-")[1])


class Checkpoints:
    """Saves one worker's parts of a run's checkpoints.

    Training stands still while DeepSpeed writes to the worker's own disk. The copy to the run's
    storage goes on beside the next steps, and the next checkpoint waits for it, so that at most one
    is waiting on that disk.

    Args:
        storage: Ray Train's folder of the run, on storage that all workers share.
        worker: number of the worker.
        resumed_at: steps of the checkpoint that was loaded; 0 without one.
        staging: empty folder on the worker's own disk.
    """

    def __init__(self, storage: Path, worker: int, resumed_at: int, staging: Path) -> None:
        self._storage, self._staging = storage, staging
        self._worker = worker
        self._copy_seconds = 0.0
        self._copied = threading.Event()
        self._copied.set()
        if worker == 0:
            self._remove_unfinished(resumed_at)

    def save(self, engine: Any, progress: Progress, loss: float) -> float:
        """Save, after the copy of the checkpoint before; every worker must call it.

        Returns:
            Seconds in which training stood still.

        Raises:
            FailedStep: the disk is full.
        """
        import ray.train

        started = time.perf_counter()
        self._copied.wait()
        step = progress.steps
        local = self._staging / f"step-{step}"
        with naming_full_disks(step, self._staging):
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
        return time.perf_counter() - started

    def take_copy_seconds(self) -> float:
        """Seconds of copying that ended since this was asked before; training went on meanwhile."""
        seconds, self._copy_seconds = self._copy_seconds, 0.0
        return seconds

    def finish(self) -> None:
        """Wait for the last copy; Ray Train removes what was copied."""
        self._copied.wait()

    def _copy(self, checkpoint: Any, name: str) -> Any:
        """Copy to the run's storage; called by Ray Train in a thread."""
        import ray.train

        storage = ray.train.get_context().get_storage()
        started = time.perf_counter()
        try:
            with naming_full_disks(step_of(Path(checkpoint.path)), self._storage):
                return storage.persist_current_checkpoint(checkpoint, name)
        except FailedStep:
            shutil.rmtree(self._storage / name, ignore_errors=True)
            raise
        finally:
            self._copy_seconds += time.perf_counter() - started
            self._copied.set()

    def _remove_unfinished(self, resumed_at: int) -> None:
        """Remove what an attempt that was killed had not finished copying."""
        for path in self._storage.glob("step-*"):
            if step_of(path) > resumed_at:
                shutil.rmtree(path, ignore_errors=True)
