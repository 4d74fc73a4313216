"""Configuration of quantisation, GGUF export and upload."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from loram_ray.config.base import Free, Identified, Section

_REPO_PART = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")
_NOT_IN_REPOS = re.compile(r"--|\.\.|\.git$")
_MAX_REPO_LENGTH = 96


def is_repo(name: str) -> bool:
    """Return whether a name is a valid ``owner/name`` of a hub repository."""
    parts = name.split("/")
    well_formed = len(parts) == 2 and all(_REPO_PART.fullmatch(part) for part in parts)
    return well_formed and len(name) <= _MAX_REPO_LENGTH and not _NOT_IN_REPOS.search(name)


class QuantizeConfig(Section):
    """Quantise a pruned or aligned model to NF4, ready for users to download and load."""

    model: Free[Path] = Field(
        description="Directory of a structurally pruned model, as written by prune or align."
    )
    output: Free[Path] = Field(description="Directory to write the quantised model to.")
    base: Free[str | None] = Field(
        None, description="Base model; named in the model card if it is a Hugging Face Hub id."
    )
    max_shard_bytes: Identified[int] = Field(
        5 * 10**9, ge=1, description="Maximum size of a weight shard in bytes."
    )


class ExportConfig(Section):
    """Export a base or merged model to a GGUF file for llama.cpp."""

    model: Free[str] = Field(
        description="Base or merged model: a directory or a Hugging Face Hub id."
    )
    output: Free[Path] = Field(description="Directory to write the GGUF file to.")
    type: Identified[Literal["f32", "bf16", "f16", "q8_0"]] = Field(
        "bf16", description="GGUF data type of matrices; vectors are stored in float32."
    )
    pre_tokenizer: Identified[str | None] = Field(
        None,
        description="Name of the pre-tokenizer in llama.cpp. Default: detected from the tokenizer.",
    )


class PublishConfig(Section):
    """Publish a finished directory as a commit to a Hugging Face Hub repository.

    The token is taken from HF_TOKEN, or from the login of the hub's client.
    """

    has_identity = False

    directory: Path = Field(
        description="Directory to upload, as written by prune, align, quantize or recover."
    )
    repo: str = Field(description="Repository owner/name on the hub, created if it does not exist.")
    private: bool = Field(
        True,
        description="Whether a new repository is private; existing repositories are unchanged.",
    )
    revision: str = Field(
        "main", min_length=1, description="Branch to commit to, created if it does not exist."
    )
    message: str | None = Field(
        None,
        min_length=1,
        description="Commit message. Default: the stage and a digest of the files.",
    )
    base: str | None = Field(
        None, description="Hub id of the base model, required to publish an adapter."
    )

    @field_validator("repo")
    @classmethod
    def _owner_and_name(cls, repo: str) -> str:
        if not is_repo(repo):
            raise ValueError(
                "must be owner/name, each made of letters, digits, '-', '_' and '.', got "
                f"{repo!r}; e.g. --set publish.repo=my-organisation/my-model"
            )
        return repo
