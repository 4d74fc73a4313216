"""Make standard streams safe to use when they are closed, full or without a reader."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from loram_ray.errors import LoramError

_NO_READER = (errno.EPIPE, errno.ECONNRESET)


@contextmanager
def safe_streams() -> Iterator[None]:
    """Make the process's standard streams safe inside the block, which runs a command.

    Closed streams are replaced by the null device, so no file opened later gets their descriptor.
    Characters that the encoding lacks are escaped. The command continues if standard error fails or
    the reader of standard output goes away.

    Raises:
        LoramError: Standard output could not be written, e.g. because the disk is full.
    """
    _reopen_closed()
    own = sys.stdout is sys.__stdout__, sys.stderr is sys.__stderr__
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if own[0]:
        sys.stdout = _lasting(sys.stdout, 1)
    if own[1]:
        sys.stderr = _lasting(sys.stderr, 2)
    try:
        yield
    except SystemExit as end:
        if not end.code:
            _require_written(sys.stdout)
        raise
    else:
        _require_written(sys.stdout)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        sys.stdout, sys.stderr = before


def _require_written(stream: TextIO) -> None:
    with suppress(ValueError):  # closed by the command itself
        stream.flush()
    fault = _fault_of(stream)
    if fault is not None and fault.errno not in _NO_READER:
        raise LoramError(
            f"standard output could not be written ({fault.strerror}); redirect it elsewhere"
        )


def reader_is_gone() -> bool:
    """Return whether the reader of standard output has closed it; further output is discarded."""
    fault = _fault_of(sys.stdout)
    return fault is not None and fault.errno in _NO_READER


class _LastingFile(io.FileIO):
    """File on a descriptor that is replaced by the null device once writing fails."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.fault: OSError | None = None

    def write(self, data: Any) -> int:
        """Write the data, or record why it cannot be written."""
        try:
            written = super().write(data)
        except BlockingIOError:
            raise
        except OSError as error:
            self.fault = error
            _to_null(self.fileno())
            return len(data)
        return len(data) if written is None else written


class _LastingText(io.TextIOWrapper):
    """Text stream over a `_LastingFile`."""

    def __init__(self, file: _LastingFile, like: TextIO) -> None:
        super().__init__(
            io.BufferedWriter(file),
            encoding=like.encoding,
            errors="backslashreplace",
            line_buffering=getattr(like, "line_buffering", True),
        )
        self.file = file


def _lasting(stream: TextIO, descriptor: int) -> TextIO:
    with suppress(OSError, ValueError):
        stream.flush()
    return _LastingText(_LastingFile(descriptor), stream)


def _fault_of(stream: TextIO) -> OSError | None:
    return stream.file.fault if isinstance(stream, _LastingText) else None


def _reopen_closed() -> None:
    """Open the null device in place of closed standard streams."""
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            _to_null(descriptor)
        if getattr(sys, name) is None:
            null = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115 - for the process's life
            setattr(sys, name, null)


def _to_null(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)
    os.set_inheritable(descriptor, True)
