"""Manifests: what a directory says of itself, and what a model is known by.

Each stage leaves ``manifest.json`` beside its files: the stage, its settings, its parents, the
versions, and the size and SHA-256 of each file. A base has no manifest; its fingerprint names it.
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
    """SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def fingerprint(checkpoint: Checkpoint, config: Mapping[str, Any] | None = None) -> str:
    """Identity of a model directory that stays cheap on 140 GB.

    SHA-256 over its configuration, every tensor's name, shape and dtype, and 16 spans of 256 bytes
    of each tensor (the whole tensor where it is smaller). Two fine-tunes of one model differ in it.

    Args:
        checkpoint: the model's weights.
        config: content of its ``config.json``, if that was read.
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
    """Return the dictionary in a model directory's ``config.json``.

    Raises:
        LoramError: it is missing or not JSON, or a file of the model cannot be read.
    """
    require_regular_files(directory)
    return read_config_file(Path(directory) / "config.json")


def read_config_file(path: Path) -> dict[str, Any]:
    """Return the dictionary in a model's configuration, whatever its name.

    Raises:
        LoramError: it is missing, not JSON, or a value has another type or an absurd size.
    """
    from loram_ray.artifacts.model_config import ModelConfig
    from loram_ray.utils.parsing.documents import checked

    if not os.path.lexists(path):
        raise LoramError(f"{path.parent} holds no {path.name}; give a model directory")
    remedy = "download it again"
    config: dict[str, Any] = read_json(path, remedy=remedy)
    checked(ModelConfig, config, str(path), remedy=remedy)
    return config


@dataclass(frozen=True)
class Manifest:
    """What a stage directory says of itself.

    Attributes:
        stage: prune, align, train, recover, merge, evaluate, quantize.
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
    format: int = FORMAT

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
    from loram_ray.artifacts.schemas import WrittenManifest
    from loram_ray.utils.parsing.documents import checked

    path = Path(directory) / MANIFEST_FILE
    if not os.path.lexists(path):  # which raises nothing, where the name is too long for one
        return None
    remedy = "make the directory again"
    data, name = read_bytes(path, remedy=remedy), f"{path} is not a manifest"
    written: dict[str, Any] = parse_json(data, f"{name}:", remedy=remedy, constants=True)
    checked(WrittenManifest, written, name, remedy=remedy)
    return Manifest(**written)


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
    require_files(Path(directory), manifest)
    for name, entry in manifest.files.items():
        path = Path(directory) / name
        if hash_file(path) != entry["sha256"]:
            raise LoramError(f"{path} differs from its manifest's SHA-256; copy it again")
    return manifest


def require_sizes(directory: Path | str, manifest: Manifest, keys: Iterable[str]) -> dict[str, int]:
    """Return sizes from a manifest's details.

    Raises:
        LoramError: one is missing, or no whole number.
    """
    for key in keys:
        size = manifest.details.get(key)
        if type(size) is not int or size < 1:
            raise LoramError(
                f"{Path(directory) / MANIFEST_FILE}: details.{key} must be a whole number above 0, "
                f"got {shown(size)}; make the directory again"
            )
    return {key: manifest.details[key] for key in keys}


def require_files(directory: Path, manifest: Manifest) -> None:
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


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write JSON durably: to a sibling, synced, renamed."""
    write_atomic(path, json.dumps(value, indent=1, default=str) + "\n", durably=True)
