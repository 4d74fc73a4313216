"""Remove the environment variables of distributed launchers.

torchrun, Kubeflow, MPI, SLURM and accelerate set rank and world size for the processes they start.
Our workers are started by Ray: one that inherits such variables would wait for processes that do
not exist.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_NAMES = frozenset(
    [
        "RANK",
        "LOCAL_RANK",
        "GROUP_RANK",
        "ROLE_RANK",
        "NODE_RANK",
        "CROSS_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_WORLD_SIZE",
        "ROLE_WORLD_SIZE",
        "ROLE_NAME",
        "CROSS_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "NNODES",
        "NPROC_PER_NODE",
        "LOCAL_SIZE",
        "FORK_LAUNCHED",
        "MPI_LOCALRANKID",
        "MPI_LOCALNRANKS",
        "AZ_BATCH_MASTER_NODE",
        "AZ_BATCHAI_MPI_MASTER_NODE",
        "AZUREML_EXPERIMENT_ID",
        "DLTS_JOB_ID",
        "SM_TRAINING_ENV",
        "SM_FRAMEWORK_PARAMS",
        "SM_HP_MP_PARAMETERS",
        "SAGEMAKER_JOB_NAME",
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "SLURM_NODEID",
        "SLURM_NTASKS",
        "SLURM_NPROCS",
        "SLURM_TASKS_PER_NODE",
        "SLURM_NTASKS_PER_NODE",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_STEP_TASKS_PER_NODE",
    ]
)
_PREFIXES = (
    "TORCHELASTIC_",
    "PET_",
    "ACCELERATE_",
    "FSDP_",
    "MEGATRON_LM_",
    "PARALLELISM_CONFIG_",
    "OMPI_COMM_WORLD_",
    "PMI_",
    "PMIX_",
    "MV2_COMM_WORLD_",
    "SMDATAPARALLEL_",
    "HOROVOD_",
)


def launcher_variables() -> list[str]:
    """Return the names of launcher variables in this process's environment."""
    return [name for name in os.environ if name in _NAMES or name.startswith(_PREFIXES)]


def forget_launchers() -> None:
    """Remove launcher variables; Ray calls this first in each worker."""
    for name in launcher_variables():
        del os.environ[name]


@contextmanager
def without_launchers() -> Iterator[None]:
    """Remove launcher variables inside the block, also for processes started in it."""
    before = {name: os.environ[name] for name in launcher_variables()}
    forget_launchers()
    try:
        yield
    finally:
        os.environ.update(before)
