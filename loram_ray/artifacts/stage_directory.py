"""Atomic stage directories.

A stage writes to a hidden sibling of its output and renames it on completion, so an output
directory that exists is complete.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from loram_ray.artifacts import FORMAT
from loram_ray.artifacts.disk import FULL
from loram_ray.artifacts.manifest import (
    MANIFEST_FILE,
    Manifest,
    digest_of,
    hash_file,
    read_manifest,
    require_files,
    write_json,
)
from loram_ray.errors import LoramError
from loram_ray.utils.files import open_lock, require_directory, write_atomic
from loram_ray.utils.names import name_error
from loram_ray.utils.parsing import read_text

_IDENTITY_NOTE = "identity"
_NOT_WRITABLE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG,
    errno.ELOOP, errno.EISDIR, errno.ENOENT, errno.EINVAL,
)  # fmt: skip
_VERSIONS_OF = ("loram-ray", "torch", "transformers", "peft", "ray", "deepspeed")


@dataclass(frozen=True)
class StageResult:
    """Result of a completed stage.

    Attributes:
        output: Output directory of the stage.
        manifest: Manifest of the output directory.
        skipped: Whether the output was already complete.
    """

    output: Path
    manifest: Manifest
    skipped: bool


class StageDirectory:
    """Output of a stage under construction.

    Attributes:
        path: Directory to write to; renamed to the output on completion.
        work: Directory of checkpoints and caches that survive an interruption; removed on
            completion.
        lock: Lock file held while the stage runs.
        details: Results to record in the manifest.
        hashes: SHA-256 of files that are already hashed, by name, to hash no file twice.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output.with_name(f".{output.name}.partial")
        self.work = output.with_name(f".{output.name}.work")
        self.lock = output.with_name(f".{output.name}.lock")
        self.details: dict[str, Any] = {}
        self.hashes: dict[str, str] = {}


def run_stage(
    output: Path | str,
    stage: str,
    settings: dict[str, Any],
    parents: dict[str, str],
    base_fingerprint: str,
    write: Callable[[StageDirectory], None],
    reads: Iterable[str | Path | None] = (),
) -> StageResult:
    """Run a stage's ``write`` unless its output is complete.

    Args:
        output: Output directory.
        stage: Name of the stage.
        settings: Settings that determine the result, besides the inputs; recorded in the manifest.
        parents: Digest of each input, by role.
        base_fingerprint: Fingerprint of the base at the root of the lineage.
        write: Function that writes the files into ``StageDirectory.path``.
        reads: Local inputs; the output must not contain one or lie inside one.

    Raises:
        LoramError: If the output holds something else or cannot be a directory, another process is
            writing it, or the disk is full.
    """
    identity = digest_of([FORMAT, stage, settings, parents])
    manifest = read_manifest(output) if os.path.isdir(output) else None
    if manifest is not None and manifest.identity == identity:
        require_files(Path(output), manifest)
        return StageResult(Path(output), manifest, skipped=True)
    require_place(Path(output), f"{stage}.output", reads)
    lineage = Manifest(stage, identity, base_fingerprint, parents, settings)
    with _stage_directory(Path(output), lineage) as target:
        write(target)
    written = read_manifest(output)
    assert written is not None
    return StageResult(Path(output), written, skipped=False)


@contextmanager
def _stage_directory(output: Path, lineage: Manifest) -> Iterator[StageDirectory]:
    """Yield a directory that becomes ``output`` as a whole, or not at all.

    Files in ``work`` of an interrupted run are kept if its identity is the same, and removed
    otherwise.
    """
    target = StageDirectory(output)
    with _naming_full_disks(target):
        require_free(output, key=f"{lineage.stage}.output")
        with _parents(target.output), _exclusive(target.lock, target.output):
            _prepare(target, lineage.identity)
            try:
                yield target
                manifest = replace(
                    lineage,
                    details=target.details,
                    files=_describe_files(target),
                    versions=_versions(),
                    created=time.time(),
                )
                write_json(target.path / MANIFEST_FILE, asdict(manifest))
                _publish(target)
            except BaseException:
                _clear(target)
                raise


@contextmanager
def _parents(output: Path) -> Iterator[None]:
    """Create the parents of an output, and remove those that stay empty if the stage fails."""
    made = [path for path in output.parents if not os.path.lexists(path)]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in made:
            with suppress(OSError):  # an interrupted stage keeps its work there
                path.rmdir()
        raise


def require_place(output: Path, key: str, reads: Iterable[str | Path | None] = ()) -> None:
    """Check that the output directory can be created and would not change what is read.

    Args:
        output: Output directory.
        key: Configuration key of the output, for messages.
        reads: Inputs of the stage; those that do not exist are not local and are ignored.

    Raises:
        LoramError: If the output is the current directory, has no name of its own, is a symbolic
            link, lies below a file, contains an input or lies inside one.
    """
    if os.path.exists(output) and output.samefile("."):
        raise LoramError(
            f"{key} must not be the current directory, which a stage cannot replace, got {output}; "
            "choose a directory inside it"
        )
    if (fault := name_error(output.name)) is not None:
        raise LoramError(
            f"{key} must be a directory whose name is {fault}, got {output}; rename it"
        )
    try:
        if output.is_symlink():
            raise LoramError(
                f"{key} must be a directory, but {output} is a symbolic link; remove it or choose "
                "another output"
            )
        place = output.resolve()
        for path in reads:
            if path is None or not os.path.exists(path):
                continue
            read = Path(path).resolve()
            if place == read or read in place.parents or place in read.parents:
                relation = "is" if place == read else "is in"
                relation = "holds" if place in read.parents else relation
                raise LoramError(
                    f"{key} must be a new or empty directory outside of the inputs, but {output} "
                    f"{relation} {path}; choose another output"
                )
    except (OSError, RuntimeError) as error:  # pathlib's own error for a loop of links
        reason = getattr(error, "strerror", None) or error
        raise LoramError(f"{key} cannot be {output} ({reason}); choose another output") from error


def require_free(output: Path, key: str) -> None:
    """Check that an output directory does not hold something else.

    Raises:
        LoramError: If it exists and is not an empty directory.
    """
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists():
        raise LoramError(
            f"{key} must be a new or empty directory, but {output} contains something else; choose "
            "another output or move it away"
        )


def require_space(directory: Path, nbytes: int) -> None:
    """Check that ``nbytes`` fit on the disk before writing them.

    Raises:
        LoramError: If the file system of ``directory`` has less free space.
    """
    free = shutil.disk_usage(directory).free
    if free < nbytes:
        raise LoramError(
            f"{directory} needs {nbytes / 1e6:,.1f} MB of free disk space, but {free / 1e6:,.1f} "
            "MB are free; free some space or choose an output on another disk"
        )


def _prepare(target: StageDirectory, identity: str) -> None:
    for directory in (target.path, target.work):
        require_directory(directory)
    shutil.rmtree(target.path, ignore_errors=True)
    target.path.mkdir()
    note = target.work / _IDENTITY_NOTE
    if not os.path.lexists(note) or read_text(note) != identity:
        shutil.rmtree(target.work, ignore_errors=True)
        target.work.mkdir()
        write_atomic(note, identity)


def _publish(target: StageDirectory) -> None:
    if target.output.is_dir():
        target.output.rmdir()
    target.path.rename(target.output)
    descriptor = os.open(target.output.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    shutil.rmtree(target.work, ignore_errors=True)


def _clear(target: StageDirectory) -> None:
    """Remove unfinished output, and the work directory if nothing was saved in it."""
    shutil.rmtree(target.path, ignore_errors=True)
    if {path.name for path in target.work.glob("*")} <= {_IDENTITY_NOTE}:
        shutil.rmtree(target.work, ignore_errors=True)


def _describe_files(target: StageDirectory) -> dict[str, dict[str, Any]]:
    files = {}
    for path in sorted(p for p in target.path.rglob("*") if p.is_file()):
        name = str(path.relative_to(target.path))
        sha256 = target.hashes.get(name) or hash_file(path)
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256}
    return files


def _versions() -> dict[str, str]:
    found = {}
    for package in _VERSIONS_OF:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    if (torch := sys.modules.get("torch")) is not None:
        found["torch"] = str(torch.__version__)  # names the build, such as +cu130
    return found


@contextmanager
def _exclusive(lock: Path, output: Path) -> Iterator[None]:
    """Hold an advisory lock that the kernel releases when the process dies."""
    descriptor = open_lock(lock)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.samestat(os.fstat(descriptor), lock.stat())
        except (BlockingIOError, FileNotFoundError):  # locked, or just released and removed
            held = False
        if not held:
            raise LoramError(
                f"{output} is being written by another process; wait for it or stop it"
            )
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


@contextmanager
def _naming_full_disks(target: StageDirectory) -> Iterator[None]:
    """Name the output in errors of writing it; the command names the files that it reads."""
    output = target.output
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise LoramError(
                f"the disk of {output} is full; nothing incomplete was left there: free some space "
                "or choose an output on another disk"
            ) from error
        if error.errno in _NOT_WRITABLE and _is_of(error, target):
            raise LoramError(
                f"{output} cannot be written ({error.strerror}); choose another output"
            ) from error
        raise


def _is_of(error: OSError, target: StageDirectory) -> bool:
    """Return whether an error concerns a file that the stage writes or a parent of its output."""
    names = (error.filename, error.filename2)
    paths = [Path(os.fsdecode(name)).absolute() for name in names if isinstance(name, str | bytes)]
    own = [path.absolute() for path in (target.path, target.work, target.lock, target.output)]
    return not paths or any(
        path == one or one in path.parents or path in one.parents for path in paths for one in own
    )
