"""Peak memory of a worker, for its progress."""

from __future__ import annotations

import resource

import torch


def peak_memory_gb() -> float:
    """Largest memory this process has used, in GB: allocated on its GPU, or resident on CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
