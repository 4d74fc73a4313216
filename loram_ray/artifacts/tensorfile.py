"""Reading and writing of safetensors files, one tensor at a time.

The safetensors library writes a file from a dictionary that holds every tensor, and reads through a
memory map whose touched pages count as memory of the process. The memory of pruning, recovery and
merging must not grow with the model, so this module reads with ``pread`` into a buffer of one
tensor, and writes the header first and then one tensor after another. The format is the library's
own, so each can read the other's files: an eight-byte little-endian header length, a JSON header
and the data.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from loram_ray.errors import LoramError, shown
from loram_ray.utils.files import open_descriptor
from loram_ray.utils.parsing import parse_json, shown_reason

MODEL = "model"
DEFAULT_SHARD_BYTES = 5 * 10**9
_MAX_HEADER_BYTES = 100_000_000
_MAX_SIZE = 2**60
"""Upper bound of sizes: more than the bytes of any file, and less than torch's largest index."""
_MAX_RANK = 16

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor whose values need not exist yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def empty(self) -> torch.Tensor:
        """Return an uninitialised tensor of this shape and dtype."""
        return torch.empty(self.shape, dtype=self.dtype)


class TensorFile:
    """A safetensors file that is validated on opening and read one tensor at a time.

    Args:
        path: Path of the file.

    Raises:
        LoramError: If the file is missing, truncated or not a safetensors file.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self._fd = open_descriptor(self.path)
            try:
                self.specs, self.metadata, self._offsets = self._read_header()
            except BaseException:
                self.close()
                raise
        except (OSError, ValueError) as error:  # ValueError: an invalid path
            reason = error.strerror if isinstance(error, OSError) else error
            raise LoramError(
                f"{self.path} could not be read ({reason}); restore the file"
            ) from error

    def _corrupt(self, reason: str) -> LoramError:
        return LoramError(
            f"{self.path} is not a valid safetensors file: {reason}; copy or download it again"
        )

    def _read_header(self) -> tuple[dict[str, TensorSpec], dict[str, str], dict[str, int]]:
        size = os.fstat(self._fd).st_size
        head = os.pread(self._fd, 8, 0)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise self._corrupt(f"its header does not fit in its {size} bytes")
        try:
            header = self._parse(os.pread(self._fd, length, 8))
            metadata = dict(header.pop("__metadata__", {}))
            if not all(isinstance(text, str) for text in metadata.values()):
                raise self._corrupt("its metadata is not text")
            specs, offsets, spans = {}, {}, []
            for name, entry in header.items():
                shape, (begin, end) = entry["shape"], entry["data_offsets"]
                numbers = (*shape, begin, end)
                if not all(type(n) is int and 0 <= n < _MAX_SIZE for n in numbers) or (
                    math.prod(size or 1 for size in shape) >= _MAX_SIZE or len(shape) > _MAX_RANK
                ):
                    place = f"[{shown(begin)}, {shown(end)}]"
                    raise self._corrupt(f"tensor {name} has shape {shown(shape)} at {place}")
                spec = TensorSpec(tuple(shape), self._dtype(name, entry["dtype"]))
                if end - begin != spec.nbytes:
                    raise self._corrupt(
                        f"tensor {name} has {end - begin} bytes, its shape requires {spec.nbytes}"
                    )
                specs[name], offsets[name] = spec, 8 + length + begin
                spans.append((begin, end))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._corrupt(f"its header cannot be read ({shown_reason(error)})") from error
        end_of_data = 0
        for begin, end in sorted(spans):
            if begin != end_of_data:
                raise self._corrupt(f"its tensors overlap or leave a gap at byte {end_of_data}")
            end_of_data = end
        if 8 + length + end_of_data != size:
            raise self._corrupt(
                f"its header declares {8 + length + end_of_data} bytes, but it has {size}"
            )
        return specs, metadata, offsets

    def _parse(self, header: bytes) -> dict[str, Any]:
        name = f"{self.path} is not a valid safetensors file: its header"
        return parse_json(header, name, remedy="copy or download it again")

    def _dtype(self, tensor: str, name: str) -> torch.dtype:
        if name not in _DTYPES:
            raise LoramError(
                f"{self.path} stores {tensor} as {name}, but loram_ray reads {', '.join(_DTYPES)}; "
                "convert the model to one of them"
            )
        return _DTYPES[name]

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor in its own buffer."""
        spec = self.specs[name]
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        if spec.nbytes:
            self.read_bytes_into(memoryview(_bytes_of(tensor)), self._offsets[name])
        return tensor

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Return some rows of one tensor in their own buffer.

        Args:
            name: Name of a tensor ``[out, ...]``.
            rows: Ascending row indices, int64 ``[n]``; consecutive rows are read together.
        """
        spec = self.specs[name]
        part = TensorSpec((len(rows), *spec.shape[1:]), spec.dtype)
        tensor = part.empty()
        if part.nbytes:
            buffer, size = memoryview(_bytes_of(tensor)), part.nbytes // len(rows)
            breaks = (rows.diff() != 1).nonzero().flatten() + 1
            done = 0
            for end in (*breaks.tolist(), len(rows)):
                place = self._offsets[name] + int(rows[done]) * size
                self.read_bytes_into(buffer[done * size : end * size], place)
                done = end
        return tensor

    def read_bytes_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset`` bytes into the file."""
        done = 0
        while done < len(buffer):
            count = os.preadv(self._fd, [buffer[done:]], offset + done)
            if count == 0:
                raise self._corrupt("it was truncated while being read")
            done += count

    def sample(self, name: str, pieces: int, piece_bytes: int) -> bytes:
        """Return up to ``pieces`` evenly spaced spans of ``piece_bytes`` of one tensor's bytes."""
        nbytes, start = self.specs[name].nbytes, self._offsets[name]
        if nbytes <= pieces * piece_bytes:
            return os.pread(self._fd, nbytes, start)
        step = (nbytes - piece_bytes) // (pieces - 1)
        spans = (os.pread(self._fd, piece_bytes, start + i * step) for i in range(pieces))
        return b"".join(spans)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TensorWriter:
    """Writer of one safetensors file, tensor by tensor, in the order of ``specs``.

    Args:
        path: Path of the new file.
        specs: Shape and dtype of every tensor, in writing order.
        metadata: Strings to store in the file's header.
    """

    def __init__(
        self, path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None
    ) -> None:
        self.path = path
        self._specs = dict(specs)
        self._pending = list(reversed(self._specs))
        header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        offset = 0
        for name, spec in self._specs.items():
            header[name] = {
                "dtype": _DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.nbytes],
            }
            offset += spec.nbytes
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._hash = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(max_workers=1)
        self._file = open(path, "wb")  # noqa: SIM115 - closed by finish() or abort()
        self._write(len(encoded).to_bytes(8, "little") + encoded)

    def _write(self, data: bytes | memoryview) -> None:
        hashing = self._hasher.submit(self._hash.update, data)  # both operations release the GIL
        try:
            self._file.write(data)
        finally:
            hashing.result()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor.

        Raises:
            ValueError: If the tensor is not the next one in ``specs``, or has another shape or
                dtype.
        """
        expected = self._pending.pop() if self._pending else None
        if name != expected:
            raise ValueError(f"expected tensor {expected}, got {name}")
        if TensorSpec(tuple(tensor.shape), tensor.dtype) != self._specs[name]:
            raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, not as declared")
        if tensor.numel():
            self._write(memoryview(_bytes_of(tensor.detach().cpu().contiguous())))

    def finish(self) -> str:
        """Flush to disk and return the file's SHA-256 in hexadecimal."""
        if self._pending:
            raise ValueError(f"{self.path}: {len(self._pending)} tensors were never written")
        self._hasher.shutdown()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._hash.hexdigest()

    def abort(self) -> None:
        """Close the file without completing it."""
        self._hasher.shutdown()
        self._file.close()


class Checkpoint:
    """Tensors of a directory with one ``model.safetensors`` or with shards and an index.

    Args:
        directory: Directory of the files.
        stem: Prefix of the files' names.

    Attributes:
        entry: Name of the file with all tensors, or of the index.

    Raises:
        LoramError: If a file is missing, truncated or corrupt, or the only weights are pickled.
    """

    def __init__(self, directory: Path | str, stem: str = MODEL) -> None:
        self.directory = Path(directory)
        self._single, self._index = f"{stem}.safetensors", index_file(stem)
        self.entry = self._single
        self.files: dict[str, TensorFile] = {}
        self.location: dict[str, str] = {}
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        index = self.directory / self._index
        weight_map: dict[str, str] = {}
        if os.path.lexists(
            self.directory / self._single
        ):  # preferred to an index, as in Transformers
            self.files[self._single] = TensorFile(self.directory / self._single)
        elif os.path.lexists(index):
            self.entry = self._index
            from loram_ray.artifacts.schemas import WrittenIndex
            from loram_ray.utils.parsing.documents import read_document

            remedy = "download it again"
            weight_map = read_document(index, WrittenIndex, remedy=remedy).weight_map
            for file_name in sorted(set(weight_map.values())):
                self.files[file_name] = TensorFile(self.directory / file_name)
            for name, file_name in weight_map.items():
                if name not in self.files[file_name].specs:
                    raise LoramError(
                        f"{self.directory / file_name} lacks tensor {name}, which {self._index} "
                        "lists; download the model again"
                    )
        else:
            raise LoramError(
                f"{self.directory} contains neither {self._single} nor {self._index}; convert "
                "pickled weights to safetensors first"
            )
        for file_name, file in self.files.items():
            for name in file.specs:
                if weight_map.get(name, file_name) == file_name:
                    self.location[name] = file_name

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every tensor, in the order of the files."""
        return {name: self.files[file].specs[name] for name, file in self.location.items()}

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(spec.nbytes for spec in self.specs.values())

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor.

        Raises:
            LoramError: If it contains NaN or infinity.
        """
        file = self.files[self.location[name]]
        return require_finite(name, file.read(name), file.path)

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Return some rows of one tensor, see `TensorFile.read_rows`.

        Raises:
            LoramError: If they contain NaN or infinity.
        """
        file = self.files[self.location[name]]
        return require_finite(name, file.read_rows(name, rows), file.path)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every name and tensor, with one tensor in memory at a time."""
        for name in self.location:
            yield name, self.read(name)

    def close(self) -> None:
        """Close all files."""
        for file in self.files.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class CheckpointWriter:
    """Writer of a model directory's weights, in shards, in the order of ``specs``.

    Args:
        directory: Existing directory.
        specs: Shape and dtype of every tensor, in writing order.
        max_shard_bytes: Maximum size of a shard; a larger tensor gets its own shard.
        stem: Prefix of the files' names.
    """

    def __init__(
        self,
        directory: Path,
        specs: Mapping[str, TensorSpec],
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        stem: str = MODEL,
    ) -> None:
        self.directory = directory
        self._stem = stem
        self._specs = dict(specs)
        self._shards = _split(self._specs, max_shard_bytes)
        self._current = -1
        self._writer: TensorWriter | None = None
        self._left = 0
        self.hashes: dict[str, str] = {}

    def _file_name(self, shard: int) -> str:
        total = len(self._shards)
        piece = "" if total == 1 else f"-{shard + 1:05d}-of-{total:05d}"
        return f"{self._stem}{piece}.safetensors"

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor, starting a new shard when the current one is full."""
        if self._writer is None:
            self._current += 1
            names = self._shards[self._current]
            path = self.directory / self._file_name(self._current)
            self._writer = TensorWriter(path, {n: self._specs[n] for n in names})
            self._left = len(names)
        self._writer.write(name, tensor)
        self._left -= 1
        if self._left == 0:
            self.hashes[self._writer.path.name] = self._writer.finish()
            self._writer = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if exc_type is not None:
            if self._writer is not None:
                self._writer.abort()
            return
        if self._writer is not None or self._current + 1 != len(self._shards):
            raise ValueError(f"{self.directory}: not every declared tensor was written")
        if len(self._shards) > 1:
            index = {
                "metadata": {"total_size": sum(s.nbytes for s in self._specs.values())},
                "weight_map": {
                    n: self._file_name(i) for i, names in enumerate(self._shards) for n in names
                },
            }
            (self.directory / index_file(self._stem)).write_text(json.dumps(index, indent=1))


def require_finite(name: str, tensor: torch.Tensor, place: Path | str) -> torch.Tensor:
    """Return a tensor after checking that it is finite; integer tensors always pass.

    Args:
        name: Name of the tensor, for the message.
        tensor: Tensor of any shape, on any device.
        place: File or directory that it was read from, for the message.

    Raises:
        LoramError: If the tensor contains NaN or infinity.
    """
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return tensor
    values = tensor.detach() if tensor.dtype.itemsize > 1 else tensor.detach().float()
    if all(extreme.isfinite() for extreme in values.aminmax()):  # one NaN makes both NaN
        return tensor
    bad = int((~values.isfinite()).sum())
    raise LoramError(
        f"tensor {name} of {place} must be finite, but {bad} of its {tensor.numel()} values are "
        "NaN or infinite; create or download it again"
    )


def index_file(stem: str) -> str:
    """Return the name of the index of sharded files."""
    return f"{stem}.safetensors.index.json"


def _split(specs: Mapping[str, TensorSpec], max_bytes: int) -> list[list[str]]:
    """Group names into shards of at most ``max_bytes``, keeping the order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    return shards


def _bytes_of(tensor: torch.Tensor):  # type: ignore[no-untyped-def]  # a numpy uint8 view
    return tensor.reshape(-1).view(torch.uint8).numpy()
