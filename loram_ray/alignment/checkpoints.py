"""Write alignment checkpoints to the worker's local disk and copy them to storage later."""

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

from loram_ray.alignment.universal_checkpoint import (
    make_universal,
    read_worker_count,
    write_worker_count,
)
from loram_ray.artifacts.disk import full_disk, is_full
from loram_ray.errors import LoramError
from loram_ray.runtime.scratch import remove_abandoned, temporary_directory

TAG = "state"
_STAGING = "loram-staging-"
_ON_NVME = "offloaded_tensors"  # directory in DeepSpeed's checkpoints


@dataclass(frozen=True)
class Progress:
    """Progress of training.

    Attributes:
        steps: Number of completed optimizer steps.
        seconds: Time spent on them over all attempts, without work lost to failures.
    """

    steps: int
    seconds: float


def staging_prefix(storage: Path) -> str:
    """Return the name prefix of a run's staging directories on its workers."""
    return f"{_STAGING}{hashlib.sha256(str(storage).encode()).hexdigest()[:16]}-"


def remove_staging(storage: Path, staging: Path | None, seconds: float) -> None:
    """Remove the staging directories that killed workers left on this machine.

    Args:
        storage: Ray Train's directory of the run.
        staging: Parent of the staging directories; defaults to the system's temporary directory.
        seconds: Time to wait for workers that are about to exit.
    """
    until = time.monotonic() + seconds
    parent = staging or temporary_directory()
    while remove_abandoned(staging_prefix(storage), parent) and time.monotonic() < until:
        time.sleep(0.1)
    remove_abandoned(_STAGING, parent)  # including those of runs whose driver was killed


class FailedStep(LoramError):
    """Step that failed for a reason the user can fix.

    Attributes:
        good_until: Last step whose weights are known to be good.
    """

    def __init__(self, message: str, good_until: int) -> None:
        super().__init__(message)
        self.good_until = good_until

    def __reduce__(self) -> tuple[type[FailedStep], tuple[str, int]]:
        return type(self), (str(self), self.good_until)


@contextmanager
def reporting_full_disks(step: int, where: Path) -> Iterator[None]:
    """Turn an error caused by a full disk into a `FailedStep`.

    Raises:
        FailedStep: If no space is left.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not is_full(error, where):
            raise
        raise FailedStep(full_disk("align", where, step), step - 1) from error


def last_checkpoint(work: Path, worker: int, workers: int) -> tuple[Path | None, bool]:
    """Return the last checkpoint of the run, and whether it was converted for these workers.

    Raises:
        LoramError: If a different number of workers wrote it with NVMe offload, which DeepSpeed
            cannot convert.
    """
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None, False
    found = Path(checkpoint.path)  # on storage shared by all workers
    if read_worker_count(found) == workers:
        return found, False
    if (found / TAG / _ON_NVME).is_dir():
        raise LoramError(
            f"align.workers must be {read_worker_count(found)}, with which {found.name} was saved "
            f"(align.offload_optimiser = nvme), got {workers}; use the same number"
        )
    universal = work / "universal" / found.name
    if worker == 0:
        make_universal(found, TAG, universal)
    torch.distributed.barrier()
    return universal, True


def complete_checkpoints(storage: Path) -> dict[int, str]:
    """Return the checkpoints of earlier attempts by step."""
    return {step_of(path): str(path) for path in storage.glob("step-*")}


def step_of(path: Path) -> int:
    """Return the step of a checkpoint directory."""
    return int(path.name.split("-")[1])


class Checkpoints:
    """Save one worker's parts of a run's checkpoints.

    Training pauses while DeepSpeed writes to the worker's local disk. The copy to storage runs in
    the background, and the next checkpoint waits for it, so the disk holds at most one pending
    checkpoint.

    Args:
        storage: Ray Train's directory of the run, on storage shared by all workers.
        worker: Rank of the worker.
        resumed_at: Step of the checkpoint that was loaded; 0 without one.
        staging: Empty directory on the worker's local disk.
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
        """Save after the previous checkpoint has been copied; every worker must call this.

        Returns:
            Seconds for which training paused.

        Raises:
            FailedStep: If the disk is full.
        """
        import ray.train

        started = time.perf_counter()
        self._copied.wait()
        step = progress.steps
        local = self._staging / f"step-{step}"
        with reporting_full_disks(step, self._staging):
            local.mkdir(parents=True)
            engine.save_checkpoint(
                str(local), tag=TAG, client_state=asdict(progress), exclude_frozen_parameters=True
            )
            if self._worker == 0:
                write_worker_count(local, engine.world_size)
        self._copied.clear()
        ray.train.report(
            {"step": step, "loss": loss},
            checkpoint=ray.train.Checkpoint.from_directory(local),
            checkpoint_dir_name=f"step-{step:08d}-{time.time_ns()}",  # the first worker's applies
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=self._copy,
        )
        return time.perf_counter() - started

    def pop_copy_seconds(self) -> float:
        """Return the seconds of background copying finished since the last call."""
        seconds, self._copy_seconds = self._copy_seconds, 0.0
        return seconds

    def finish(self) -> None:
        """Wait for the last copy; Ray Train removes the staged files."""
        self._copied.wait()

    def _copy(self, checkpoint: Any, name: str) -> Any:
        """Copy a checkpoint to storage; called by Ray Train in a thread."""
        import ray.train

        storage = ray.train.get_context().get_storage()
        started = time.perf_counter()
        try:
            with reporting_full_disks(step_of(Path(checkpoint.path)), self._storage):
                return storage.persist_current_checkpoint(checkpoint, name)
        except FailedStep:
            shutil.rmtree(self._storage / name, ignore_errors=True)
            raise
        finally:
            self._copy_seconds += time.perf_counter() - started
            self._copied.set()

    def _remove_unfinished(self, resumed_at: int) -> None:
        """Remove checkpoints that a killed attempt had not finished copying."""
        for path in self._storage.glob("step-*"):
            if step_of(path) > resumed_at:
                shutil.rmtree(path, ignore_errors=True)
