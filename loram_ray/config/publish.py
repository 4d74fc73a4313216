"""Settings of what is done with a finished directory: quantisation, GGUF, the upload."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from loram_ray.config.base import Section

_REPO_PART = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")
_NOT_IN_REPOS = re.compile(r"--|\.\.|\.git$")
_MAX_REPO_LENGTH = 96


def is_repo(name: str) -> bool:
    """Whether a name is ``owner/name`` as hubs have it."""
    parts = name.split("/")
    well_formed = len(parts) == 2 and all(_REPO_PART.fullmatch(part) for part in parts)
    return well_formed and len(name) <= _MAX_REPO_LENGTH and not _NOT_IN_REPOS.search(name)


class QuantizeConfig(Section):
    """quantize: a pruned or aligned model becomes one in NF4, which users download and load."""

    model: Path = Field(description="directory written by prune or align, structurally pruned")
    output: Path = Field(description="directory to write")
    base: str | None = Field(None, description="base model, named in the card if it is a hub id")
    max_shard_bytes: int = Field(5 * 10**9, ge=1, description="upper bound of a weight shard")


class ExportConfig(Section):
    """export: a base or merged model becomes one GGUF file, for llama.cpp."""

    model: str = Field(description="base or merged model: a directory or a hub id")
    output: Path = Field(description="directory to write")
    type: Literal["f32", "bf16", "f16", "q8_0"] = Field(
        "bf16", description="of matrices; vectors are in float32"
    )
    pre_tokenizer: str | None = Field(
        None, description="llama.cpp's name of the pre-tokenisation; default: recognised"
    )


class PublishConfig(Section):
    """publish: a finished directory becomes a commit of a hub repository.

    The token is that of HF_TOKEN, or of the hub's own login.
    """

    directory: Path = Field(description="written by prune, align, quantize or recover")
    repo: str = Field(description="owner/name on the hub; made if it is not there")
    private: bool = Field(True, description="of a repository that is made; others stay as they are")
    revision: str = Field("main", min_length=1, description="branch; made if it is not there")
    message: str | None = Field(
        None,
        min_length=1,
        description="of the commit; default: the stage and a digest of the files",
    )
    base: str | None = Field(
        None, description="hub id of the base, which a published adapter must name"
    )

    @field_validator("repo")
    @classmethod
    def _owner_and_name(cls, repo: str) -> str:
        if not is_repo(repo):
            raise ValueError(
                f"must be owner/name, each of letters, digits, '-', '_' and '.', got {repo!r}; "
                "e.g. --set publish.repo=my-organisation/my-model"
            )
        return repo
