"""Remove exact duplicates across all sources of a corpus, keeping the first of equal documents.

Each unit writes the sorted hashes of its documents. Hashes with the same prefix form a part, and
each part is compared on its own. Memory is bounded by the hashes of one unit or of one part. Parts
are independent, and the result depends neither on their number nor on the order of the tasks.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from loram_ray.corpus.read import BadRow, Unit
from loram_ray.corpus.selection import Selection, content_hash

PART_DOCUMENTS = 2**22
_ENTRY = np.dtype([("high", "<u8"), ("low", "<u8"), ("document", "<u8")])
_UNIT_BITS = 32


def write_hashes(unit: Unit, work: Path, selection: Selection) -> None:
    """Write a sorted hash entry for each document of a unit that passes the filters."""
    hashes = bytearray()
    for document in selection.documents(unit):
        if document is not None and not isinstance(document, BadRow):
            hashes += content_hash(document)
    halves = np.frombuffer(hashes, dtype="<u8").reshape(-1, 2)
    entries = np.empty(len(halves), dtype=_ENTRY)
    entries["high"], entries["low"] = halves[:, 0], halves[:, 1]
    entries["document"] = (unit.index << _UNIT_BITS) + np.arange(len(halves), dtype=np.uint64)
    _save(hash_file_of(work, unit.index), entries[np.lexsort((entries["low"], entries["high"]))])


def count_parts(work: Path, units: int) -> int:
    """Return the number of parts, with about four million documents in each."""
    nbytes = sum(hash_file_of(work, unit).stat().st_size for unit in range(units))
    return max(1, -(-nbytes // (PART_DOCUMENTS * _ENTRY.itemsize)))


def find_duplicates(part: int, parts: int, work: Path, units: int) -> None:
    """Write the sorted documents of one part that equal an earlier document."""
    ends = [min(2**64 * number // parts, 2**64 - 1) for number in (part, part + 1)]
    bounds = np.array(ends, dtype=np.uint64)
    slices = []
    for unit in range(units):
        entries = np.load(hash_file_of(work, unit), mmap_mode="r")
        first, last = np.searchsorted(entries["high"], bounds)
        if part + 1 == parts:
            last = len(entries)
        slices.append(entries[first:last])
    found = np.concatenate(slices)
    found = found[np.lexsort((found["document"], found["low"], found["high"]))]
    same = (found["high"][1:] == found["high"][:-1]) & (found["low"][1:] == found["low"][:-1])
    _save(duplicates_file_of(work, part), np.sort(found["document"][1:][same]))


def duplicates_of(unit: int, parts: int, work: Path) -> np.ndarray:
    """Return the sorted positions of a unit's duplicates among its documents that pass filters."""
    bounds = np.array([unit, unit + 1], dtype=np.uint64) << np.uint64(_UNIT_BITS)
    slices = []
    for part in range(parts):
        found = np.load(duplicates_file_of(work, part), mmap_mode="r")
        first, last = np.searchsorted(found, bounds)
        slices.append(found[first:last] - bounds[0])
    return np.sort(np.concatenate(slices)).astype(np.int64)


def hash_file_of(work: Path, unit: int) -> Path:
    """Return the path of a unit's hashes."""
    return work / f"hashes-{unit:06d}.npy"


def duplicates_file_of(work: Path, part: int) -> Path:
    """Return the path of a part's duplicates."""
    return work / f"duplicates-{part:06d}.npy"


def _save(path: Path, array: np.ndarray) -> None:
    sibling = path.with_name(f".{path.name}")
    np.save(sibling, array)  # keeps the suffix .npy, which NumPy would add
    sibling.replace(path)
