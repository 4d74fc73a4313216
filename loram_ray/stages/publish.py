"""Publishing: uploads a finished directory as a commit to a hub repository."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from loram_ray.artifacts.adapter import CONFIG_FILE as ADAPTER_CONFIG_FILE
from loram_ray.artifacts.manifest import MANIFEST_FILE, Manifest, require_stage
from loram_ray.config import PublishConfig, RayConfig
from loram_ray.errors import LoramError
from loram_ray.runtime.progress import say
from loram_ray.stages.model_card import hub_id
from loram_ray.utils.parsing import read_json, read_text

PUBLISHED = ("prune", "align", "quantize", "recover")
_MODEL_CONFIG_FILE = "config.json"
_BASE_OF_ADAPTER, _ORIGIN_OF_MODEL = "base_model_name_or_path", "_name_or_path"
# Files that stages write. A tokenizer's vocabulary may contain text that looks like a path.
_OWN_TEXT = (MANIFEST_FILE, _MODEL_CONFIG_FILE, ADAPTER_CONFIG_FILE, "README.md", "metrics.jsonl")
_ABSOLUTE_PATH = re.compile(r"(?<![\w.:/~-])/([\w.-]+)(?:/[\w.-]+)+")
_WEIGHTS = (".safetensors", ".safetensors.index.json")
_REFUSED = (401, 403)


@dataclass(frozen=True)
class PublishResult:
    """Result of a publication.

    Attributes:
        url: Address of the repository.
        commit: Hash of the commit that holds the directory.
        files: Number of the directory's files.
        bytes: Total size of the files in bytes.
        changed: False if the repository already held the same files.
    """

    url: str
    commit: str
    files: int
    bytes: int
    changed: bool


def publish(config: PublishConfig, ray_config: RayConfig | None = None) -> PublishResult:
    """Upload a finished directory to a hub repository, as one commit.

    The files are the manifest and those that it lists, after their hashes are checked. Files that
    the repository already holds are not sent again. Weights of an earlier publication under other
    names are deleted in the same commit.

    This function runs in the calling process; ``ray_config`` is unused.

    Raises:
        LoramError: The directory is not finished, names local paths or contains links, or there is
            no token or the token has no write access.
    """
    manifest = require_stage(config.directory, PUBLISHED, "publish.directory")
    _refuse_links(config.directory, manifest)
    contents = _contents(config, manifest)
    _refuse_local_paths(config.directory, contents)
    if get_token() is None:
        raise LoramError(
            "publish needs a Hub token with write access, got none; set HF_TOKEN or run 'hf auth "
            "login'"
        )
    api = HfApi(library_name="loram-ray")
    with _naming_refusals(config.repo):
        url = api.create_repo(config.repo, private=config.private, exist_ok=True)
        if config.revision != "main":
            api.create_branch(config.repo, branch=config.revision, exist_ok=True)
        before = api.model_info(config.repo, revision=config.revision)
        held = [sibling.rfilename for sibling in before.siblings or ()]
        stale = [name for name in held if name.endswith(_WEIGHTS) and name not in contents]
        sizes = {name: _size(content) for name, content in contents.items()}
        say("publish", f"{len(sizes)} files, {sum(sizes.values()) / 1e6:,.1f} MB, to {url}")
        commit = api.create_commit(
            config.repo,
            operations=[
                *(CommitOperationAdd(name, content) for name, content in contents.items()),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message=config.message or f"loram {manifest.stage} {manifest.digest[:12]}",
            revision=config.revision,
        )
    return PublishResult(
        url=str(url),
        commit=commit.oid,
        files=len(sizes),
        bytes=sum(sizes.values()),
        changed=commit.oid != before.sha,
    )


def _contents(config: PublishConfig, manifest: Manifest) -> dict[str, Path | bytes]:
    """Return what is uploaded, by name: files, or new content for configurations with local paths.

    Raises:
        LoramError: The adapter's base has no name on the hub.
    """
    contents: dict[str, Path | bytes] = {name: config.directory / name for name in manifest.files}
    changed: dict[str, bytes] = {}
    if ADAPTER_CONFIG_FILE in contents:
        settings = _read(config.directory / ADAPTER_CONFIG_FILE)
        if hub_id(settings.get(_BASE_OF_ADAPTER)) is None:
            base = hub_id(config.base)
            if base is None:
                raise LoramError(
                    f"publish.base must be the Hub id of the adapter's base, as {config.directory} "
                    f"records a local path, got {config.base}; set it to owner/name"
                )
            changed[ADAPTER_CONFIG_FILE] = _json({**settings, _BASE_OF_ADAPTER: base})
    if _MODEL_CONFIG_FILE in contents:
        settings = _read(config.directory / _MODEL_CONFIG_FILE)
        if _ORIGIN_OF_MODEL in settings and hub_id(settings.pop(_ORIGIN_OF_MODEL)) is None:
            changed[_MODEL_CONFIG_FILE] = _json(settings)
    contents.update(changed)
    if not changed:
        contents[MANIFEST_FILE] = config.directory / MANIFEST_FILE
        return contents
    entries = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in changed.items()
    }
    described = replace(manifest, files={**manifest.files, **entries})
    contents[MANIFEST_FILE] = _json(asdict(described))
    return contents


def _refuse_links(directory: Path, manifest: Manifest) -> None:
    """Raise an error for files outside the directory, as links may point to secrets."""
    root = directory.resolve()
    for name in (*manifest.files, MANIFEST_FILE):
        if not (directory / name).resolve().is_relative_to(root):
            raise LoramError(
                f"publish.directory must contain its files, but {directory / name} links to "
                "another place; copy the file"
            )


def _refuse_local_paths(directory: Path, contents: dict[str, Path | bytes]) -> None:
    """Raise an error for files written by stages that contain a local path."""
    for name in _OWN_TEXT:
        content = contents.get(name)
        if content is None:
            continue
        text = content.decode() if isinstance(content, bytes) else read_text(content)
        for found in _ABSOLUTE_PATH.finditer(text):
            if Path("/", found[1]).is_dir():
                raise LoramError(
                    f"publish.directory must not contain local paths, but {directory / name} "
                    f"contains {found[0]}; remove it from the settings and run the stage again"
                )


@contextmanager
def _naming_refusals(repo: str) -> Iterator[None]:
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise LoramError(
            "publish needs access to the Hub, but HF_HUB_OFFLINE is set; unset it"
        ) from error
    except HfHubHTTPError as error:
        if error.response.status_code in _REFUSED:
            raise LoramError(
                f"publish.repo must be writable with this token, but {repo} is not (HTTP "
                f"{error.response.status_code}); use a token with write access to it"
            ) from error
        raise


def _read(path: Path) -> dict[str, Any]:
    settings: dict[str, Any] = read_json(path)
    return settings


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size
