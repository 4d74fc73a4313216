"""Manifests of stage directories, and fingerprints of models.

Each stage writes ``manifest.json`` beside its files: the stage, its settings, its parents, package
versions, and the size and SHA-256 of each file. A base has no manifest; its fingerprint identifies
it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loram_ray.artifacts import FORMAT
from loram_ray.artifacts.tensorfile import Checkpoint
from loram_ray.errors import LoramError, shown
from loram_ray.utils.files import open_regular, require_regular_files, write_atomic
from loram_ray.utils.parsing import parse_json, read_bytes, read_json

MANIFEST_FILE = "manifest.json"
_VOLATILE_CONFIG_KEYS = ("_name_or_path", "_model_name_or_path", "transformers_version")
_SAMPLE_PIECES, _SAMPLE_BYTES = 16, 256


def digest_of(value: object) -> str:
    """Return the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def fingerprint(checkpoint: Checkpoint, config: Mapping[str, Any] | None = None) -> str:
    """Return the identity of a model directory, cheap to compute even for 140 GB.

    It is the SHA-256 of the configuration, of every tensor's name, shape and dtype, and of 16 spans
    of 256 bytes from each tensor (or the whole tensor if it is smaller). Two fine-tunes of one
    model have different fingerprints.

    Args:
        checkpoint: Weights of the model.
        config: Content of ``config.json``; read from the directory by default.
    """
    config = read_model_config(checkpoint.directory) if config is None else config
    kept = {key: value for key, value in config.items() if key not in _VOLATILE_CONFIG_KEYS}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for name in sorted(checkpoint.location):
        file = checkpoint.files[checkpoint.location[name]]
        spec = file.specs[name]
        digest.update(f"{name}|{spec.shape}|{spec.dtype}".encode())
        digest.update(file.sample(name, _SAMPLE_PIECES, _SAMPLE_BYTES))
    return digest.hexdigest()


def read_model_config(directory: Path | str) -> dict[str, Any]:
    """Return the content of a model directory's ``config.json``.

    Raises:
        LoramError: If it is missing or not JSON, or a file of the model cannot be read.
    """
    require_regular_files(directory)
    return read_config_file(Path(directory) / "config.json")


def read_config_file(path: Path) -> dict[str, Any]:
    """Return the content of a model's configuration file, whatever its name.

    Raises:
        LoramError: If it is missing or not JSON, or a value has a wrong type or an absurd size.
    """
    from loram_ray.artifacts.model_config import ModelConfig
    from loram_ray.utils.parsing.documents import checked

    if not os.path.lexists(path):
        raise LoramError(f"{path.parent} contains no {path.name}; use a model directory")
    remedy = "download it again"
    config: dict[str, Any] = read_json(path, remedy=remedy)
    checked(ModelConfig, config, str(path), remedy=remedy)
    return config


@dataclass(frozen=True)
class Manifest:
    """Manifest of a stage directory.

    Attributes:
        stage: Name of the stage: prune, align, train, recover, merge, evaluate or quantize.
        identity: Digest of the stage's settings and inputs; the same work has the same identity.
        base_fingerprint: Fingerprint of the base at the root of the lineage.
        parents: Digest of each input's manifest, by role.
        settings: Configuration of the stage.
        details: Results worth keeping (parameters, bytes, tokens, steps, seconds).
        files: Size and hash of each file, ``{name: {"bytes": int, "sha256": str}}``.
        versions: Versions of the packages that wrote the directory.
        created: Creation time in seconds since the epoch.
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
    format: int = FORMAT

    @property
    def digest(self) -> str:
        """Identity of the directory's content: equal content has equal digests."""
        hashes = {name: entry["sha256"] for name, entry in self.files.items()}
        return digest_of([self.stage, self.base_fingerprint, hashes])


def read_manifest(directory: Path | str) -> Manifest | None:
    """Return a directory's manifest, or None if it has none.

    Raises:
        LoramError: If the manifest cannot be read.
    """
    from loram_ray.artifacts.schemas import WrittenManifest
    from loram_ray.utils.parsing.documents import checked

    path = Path(directory) / MANIFEST_FILE
    if not os.path.lexists(path):  # does not raise if the name is too long
        return None
    remedy = "run the stage that wrote it again"
    data, name = read_bytes(path, remedy=remedy), f"{path} is not a manifest"
    written: dict[str, Any] = parse_json(data, f"{name}:", remedy=remedy, constants=True)
    checked(WrittenManifest, written, name, remedy=remedy)
    return Manifest(**written)


def require_stage(directory: Path | str, stages: tuple[str, ...], key: str) -> Manifest:
    """Check every file of an input directory against its manifest and return the manifest.

    Args:
        directory: Input directory.
        stages: Stages that may have written it.
        key: Configuration key that named it, for messages.

    Raises:
        LoramError: If none of the stages wrote the directory, or a file is missing, truncated or
            changed.
    """
    manifest = read_manifest(directory)
    if manifest is None or manifest.stage not in stages:
        found = "no manifest.json" if manifest is None else f"the output of {manifest.stage}"
        raise LoramError(
            f"{key} must be a directory written by {' or '.join(stages)}, but {directory} contains "
            f"{found}; run loram {stages[0]} first, or use its output"
        )
    require_files(Path(directory), manifest)
    for name, entry in manifest.files.items():
        path = Path(directory) / name
        if hash_file(path) != entry["sha256"]:
            raise LoramError(f"{path} does not match the SHA-256 in its manifest; copy it again")
    return manifest


def require_sizes(directory: Path | str, manifest: Manifest, keys: Iterable[str]) -> dict[str, int]:
    """Return sizes from a manifest's details.

    Raises:
        LoramError: If a size is missing or not a whole number.
    """
    for key in keys:
        size = manifest.details.get(key)
        if type(size) is not int or size < 1:
            raise LoramError(
                f"{Path(directory) / MANIFEST_FILE}: details.{key} must be a positive integer, got "
                f"{shown(size)}; run the stage that wrote it again"
            )
    return {key: manifest.details[key] for key in keys}


def require_files(directory: Path, manifest: Manifest) -> None:
    """Check that a directory has all files of its manifest, with the recorded sizes."""
    for name, entry in manifest.files.items():
        path = directory / name
        size = path.stat().st_size if path.exists() else -1
        if size != entry["bytes"]:
            found = "is missing" if size < 0 else f"has {size} bytes"
            raise LoramError(
                f"{path} {found}, but its manifest lists {entry['bytes']} bytes; copy it again, or "
                "move the directory away and run the stage again"
            )


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write JSON durably: write a sibling file, sync it and rename it."""
    write_atomic(path, json.dumps(value, indent=1, default=str) + "\n", durably=True)
