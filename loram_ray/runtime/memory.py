"""Measure a worker's peak memory, and return freed memory to the operating system."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

_MMAP_THRESHOLD = -3  # glibc's malloc.h
_AT_ONCE, _LARGEST = 2**16, 2**25  # bytes; the second is glibc's upper limit of the threshold


def peak_memory_gb() -> float:
    """Return this process's peak memory in GB: allocated on its GPU, or resident on CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def return_freed_memory() -> None:
    """Make the C library return freed memory to the operating system.

    Allocating and freeing the tensors of one layer after another fragments glibc's heap: it retains
    more than the live tensors need, and more with every layer.
    """
    with suppress(OSError, AttributeError):  # another C library has no such function
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Return each freed tensor's memory immediately inside the block.

    glibc maps large blocks individually and unmaps them when freed, but raises its mmap threshold
    whenever such a block is freed; blocks below the threshold come from the heap and stay there.
    When tensors of many sizes are loaded one by one, the heap retains many times the largest.
    """
    with suppress(OSError, AttributeError):  # another C library has no such function
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _AT_ONCE)
    try:
        yield
    finally:
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGEST)
        return_freed_memory()
