"""Memory of a worker: its peak, and giving back what it no longer uses."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

_MMAP_THRESHOLD = -3  # glibc's malloc.h
_AT_ONCE, _LARGEST = 2**16, 2**25  # bytes; the second is where glibc's own adjustment ends


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


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Inside the block, give each freed tensor's memory back at once.

    glibc asks the system for large pieces one by one, and gives them back, until the first of them
    is freed; from then on it cuts pieces of that size from its heap and keeps them. Where tensors
    of all sizes come and go one by one, it so keeps many times the largest.
    """
    with suppress(OSError, AttributeError):  # another C library has no such function
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _AT_ONCE)
    try:
        yield
    finally:
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGEST)
        return_freed_memory()
