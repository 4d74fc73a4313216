"""Memory of a worker: its peak, and giving back what it no longer uses."""

from __future__ import annotations

import ctypes
import resource
from contextlib import suppress

import torch


def peak_memory_gb() -> float:
    """Largest memory this process has used, in GB: allocated on its GPU, or resident on CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def return_freed_memory() -> None:
    """Have the C library give freed memory back to the system.

    glibc's heap, after the tensors of one layer after another were allocated and freed in it, lies
    in pieces: it keeps more than the live tensors need, and more with every layer.
    """
    with suppress(OSError, AttributeError):  # another C library has no such function
        ctypes.CDLL(None).malloc_trim(0)
