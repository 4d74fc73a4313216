"""Lineage, fingerprints and atomic stage directories.

A stage writes to a hidden sibling of its output and renames it at the end, so a directory that
exists is complete. Beside the weights it leaves ``manifest.json``: the stage, its settings, its
parents, the versions, and the size and SHA-256 of each file.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from loram_ray.errors import LoramError
from loram_ray.tensorfile import Checkpoint

MANIFEST_FILE = "manifest.json"
_FORMAT = 1
_IDENTITY_NOTE = "identity"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
_VERSIONS_OF = ("loram-ray", "torch", "transformers", "peft", "ray", "deepspeed")
_VOLATILE_CONFIG_KEYS = ("_name_or_path", "_model_name_or_path", "transformers_version")
_SAMPLE_PIECES, _SAMPLE_BYTES = 16, 256


def digest_of(value: object) -> str:
    """SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def fingerprint(checkpoint: Checkpoint) -> str:
    """Identity of a model directory that stays cheap on 140 GB.

    SHA-256 over its configuration, every tensor's name, shape and dtype, and 16 spans of 256 bytes
    of each tensor (the whole tensor where it is smaller). Two fine-tunes of one model differ in it.
    """
    config = read_model_config(checkpoint.directory)
    kept = {key: value for key, value in config.items() if key not in _VOLATILE_CONFIG_KEYS}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for name in sorted(checkpoint.location):
        file = checkpoint.files[checkpoint.location[name]]
        spec = file.specs[name]
        digest.update(f"{name}|{spec.shape}|{spec.dtype}".encode())
        digest.update(file.sample(name, _SAMPLE_PIECES, _SAMPLE_BYTES))
    return digest.hexdigest()


def read_model_config(directory: Path | str) -> dict[str, Any]:
    """Return the dictionary in a model directory's ``config.json``.

    Raises:
        LoramError: it is missing or not JSON.
    """
    path = Path(directory) / "config.json"
    try:
        config = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise LoramError(f"{directory} holds no config.json; give a model directory") from error
    except ValueError as error:
        raise LoramError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(config, dict):
        raise LoramError(f"{path} must hold a JSON object, got {config!r:.40}; download it again")
    return config


@dataclass(frozen=True)
class Manifest:
    """What a stage directory says of itself.

    Attributes:
        stage: prune, align, train, recover, merge, evaluate.
        identity: digest of the stage's settings and inputs; the same work has the same identity.
        base_fingerprint: the base model at the root of the lineage.
        parents: digest of the manifest of each input, by role.
        settings: the stage's configuration.
        details: results worth keeping (parameters, bytes, tokens, steps, seconds).
        files: ``{name: {"bytes": int, "sha256": str}}``.
        versions: packages that wrote it.
        created: seconds since the epoch.
    """

    stage: str
    identity: str
    base_fingerprint: str
    parents: dict[str, str]
    settings: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    created: float = 0.0
    format: int = _FORMAT

    @property
    def digest(self) -> str:
        """Identity of the directory's content: equal content has equal digests."""
        hashes = {name: entry["sha256"] for name, entry in self.files.items()}
        return digest_of([self.stage, self.base_fingerprint, hashes])


def read_manifest(directory: Path | str) -> Manifest | None:
    """Return a directory's manifest, or None where there is none.

    Raises:
        LoramError: it is there but cannot be read.
    """
    path = Path(directory) / MANIFEST_FILE
    if not path.is_file():
        return None
    try:
        return Manifest(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise LoramError(f"{path} is not a manifest ({error}); make the directory again") from error


def require_stage(directory: Path | str, stages: tuple[str, ...], key: str) -> Manifest:
    """Return the manifest of an input directory after checking every file against it.

    Args:
        directory: the input.
        stages: stages that may have written it.
        key: the configuration key it came from, for the message.

    Raises:
        LoramError: not such a directory, or a file is missing, truncated or changed.
    """
    manifest = read_manifest(directory)
    if manifest is None or manifest.stage not in stages:
        found = "no manifest.json" if manifest is None else f"the output of {manifest.stage}"
        raise LoramError(
            f"{key} must be a directory written by {' or '.join(stages)}, {directory} holds "
            f"{found}; run loram {stages[0]} first or give its output"
        )
    _require_files(Path(directory), manifest)
    for name, entry in manifest.files.items():
        path = Path(directory) / name
        if hash_file(path) != entry["sha256"]:
            raise LoramError(f"{path} differs from its manifest's SHA-256; copy it again")
    return manifest


def _require_files(directory: Path, manifest: Manifest) -> None:
    """Refuse a directory that lacks a file of its manifest, or has one of another size."""
    for name, entry in manifest.files.items():
        path = directory / name
        size = path.stat().st_size if path.exists() else -1
        if size != entry["bytes"]:
            found = "is missing" if size < 0 else f"has {size} bytes"
            raise LoramError(
                f"{path} {found}, its manifest says {entry['bytes']} bytes; copy it again, or move "
                "the directory away to have it made again"
            )


def identify_model(directory: Path | str, key: str) -> tuple[str, str]:
    """Return a model directory's digest and the fingerprint of the base it comes from.

    A directory that a stage wrote is checked against its manifest. A merged model is a base in its
    own right, as any other directory is.

    Raises:
        LoramError: not a model directory, or damaged.
    """
    if read_manifest(directory) is not None:
        manifest = require_stage(directory, ("prune", "align", "merge"), key)
        if manifest.stage != "merge":
            return manifest.digest, manifest.base_fingerprint
    with Checkpoint(directory) as checkpoint:
        identity = fingerprint(checkpoint)
    return identity, identity


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class StageResult:
    """A completed stage.

    Attributes:
        output: its directory.
        manifest: what the directory says of itself.
        skipped: True where the directory was complete before.
    """

    output: Path
    manifest: Manifest
    skipped: bool


class StageDirectory:
    """A stage's output under construction.

    Attributes:
        path: where to write; renamed to the output when the stage completes.
        work: checkpoints and caches that outlive an interruption; removed on completion.
        lock: held while the stage runs.
        details: goes into the manifest.
        hashes: SHA-256 of files already known, to hash no file twice.
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
) -> StageResult:
    """Run a stage's ``write`` unless its output is complete.

    Args:
        output: directory to make.
        stage: the stage's name.
        settings: what determines the result, besides the inputs; kept in the manifest.
        parents: digest of each input, by role.
        base_fingerprint: the base at the root of the lineage.
        write: writes the files into ``StageDirectory.path``.

    Raises:
        LoramError: the output holds something else, another process writes it, or the disk is full.
    """
    identity = digest_of([_FORMAT, stage, settings, parents])
    manifest = read_manifest(output) if Path(output).is_dir() else None
    if manifest is not None and manifest.identity == identity:
        _require_files(Path(output), manifest)
        return StageResult(Path(output), manifest, skipped=True)
    lineage = Manifest(stage, identity, base_fingerprint, parents, settings)
    with _stage_directory(Path(output), lineage) as target:
        write(target)
    written = read_manifest(output)
    assert written is not None
    return StageResult(Path(output), written, skipped=False)


@contextmanager
def _stage_directory(output: Path, lineage: Manifest) -> Iterator[StageDirectory]:
    """Yield a directory that becomes ``output`` whole, or not at all.

    Work of an interrupted run is kept in ``work`` if it has the same identity, else cleared.
    """
    require_free(output, key=f"{lineage.stage}.output")
    target = StageDirectory(output)
    with _naming_full_disks(target.output):
        target.output.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(target.lock, target.output):
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


def require_free(output: Path, key: str) -> None:
    """Refuse an output directory that holds something else.

    Raises:
        LoramError: it exists and is not an empty directory, or is the one we are in.
    """
    if output.exists() and output.samefile("."):
        raise LoramError(
            f"{key} must not be the current directory, which a stage cannot replace, got {output}; "
            "name a new directory in it"
        )
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists():
        raise LoramError(
            f"{key} must be a new or empty directory, {output} holds something else; "
            "choose another output or move it away"
        )


def require_space(directory: Path, nbytes: int) -> None:
    """Refuse to start writing ``nbytes`` where they do not fit.

    Raises:
        LoramError: the file system of ``directory`` has less left.
    """
    free = shutil.disk_usage(directory).free
    if free < nbytes:
        raise LoramError(
            f"{directory} needs {nbytes / 1e6:,.1f} MB free, its disk has {free / 1e6:,.1f} MB; "
            "free some space or choose an output on another disk"
        )


def write_json(path: Path, value: object) -> None:
    """Write JSON durably: to a sibling, synced, renamed."""
    sibling = path.with_name(f".{path.name}.tmp")
    with open(sibling, "w") as file:
        json.dump(value, file, indent=1, default=str)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    sibling.replace(path)


def _prepare(target: StageDirectory, identity: str) -> None:
    shutil.rmtree(target.path, ignore_errors=True)
    target.path.mkdir()
    note = target.work / _IDENTITY_NOTE
    if not note.exists() or note.read_text() != identity:
        shutil.rmtree(target.work, ignore_errors=True)
        target.work.mkdir()
        note.write_text(identity)


def _publish(target: StageDirectory) -> None:
    if target.output.is_dir():
        target.output.rmdir()
    target.path.rename(target.output)
    descriptor = os.open(target.output.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    shutil.rmtree(target.work, ignore_errors=True)


def _clear(target: StageDirectory) -> None:
    """Remove what is half-written, and the work directory where nothing was saved in it."""
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
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@contextmanager
def _exclusive(lock: Path, output: Path) -> Iterator[None]:
    """Hold an advisory lock that the kernel releases when its process dies."""
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.samestat(os.fstat(file.fileno()), lock.stat())
        except (BlockingIOError, FileNotFoundError):  # held, or just let go and removed
            held = False
        if not held:
            raise LoramError(
                f"{output} is being written by another process; wait for it or stop it"
            )
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextmanager
def _naming_full_disks(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise LoramError(
                f"the disk of {output} is full; nothing was left half-written there, free some "
                "space or choose an output on another disk"
            ) from error
        if error.errno in _NOT_WRITABLE:
            raise LoramError(
                f"{output} cannot be written ({error.strerror}); choose another output"
            ) from error
        raise
