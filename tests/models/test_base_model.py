"""A model directory as stages read it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

import loram_ray as lr
from loram_ray.errors import LoramError
from loram_ray.models.base import BaseModel

_opened: list[Path] | None = None


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], str | Path):
        _opened.append(Path(arguments[0]))


sys.addaudithook(_note)


def test_a_configuration_is_read_once(base: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(base, tmp_path / "base"))
    with BaseModel.open(str(copy), "prune.base") as model:
        assert model.directory == copy
        assert model.config["model_type"] == model.family.model_type == "llama"
        (copy / "config.json").unlink()
        assert model.geometry.num_layers == 4
        assert model.positions == model.config["max_position_embeddings"]
        assert not model.is_pruned
        kept = model.fingerprint
    assert BaseModel(base, "prune.base").identify() == (kept, kept)


def test_pruning_reads_its_base_s_configuration_once(base: Path, tmp_path: Path) -> None:
    global _opened
    _opened = []
    try:
        config = lr.PruneConfig(
            base=str(base), output=tmp_path / "pruned", ratio=0.5, layers=(1, 3)
        )
        lr.prune(config)
        assert _opened.count(base / "config.json") == 1
    finally:
        _opened = None


def test_weights_are_opened_when_they_are_asked_for(base: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    model = BaseModel(tmp_path, "merge.base")
    assert model.geometry.num_layers == 4
    with pytest.raises(LoramError, match="safetensors"):
        _ = model.checkpoint
    model.close()


def test_pruned_and_quantised_models_are_no_bases(base: Path, pruned: Path, tmp_path: Path) -> None:
    with pytest.raises(
        LoramError, match=r"^merge\.base must be a model that is not pruned, but here"
    ):
        BaseModel(pruned, "merge.base", "here").require_full()
    settings = json.loads((base / "config.json").read_text())
    settings["quantization_config"] = {"load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(LoramError, match="is quantised and merging would round; use the model"):
        BaseModel(tmp_path, "merge.base").require_full(" and merging would round")
    BaseModel(base, "merge.base").require_full()


def test_what_a_stage_made_is_identified_by_its_manifest(pruned: Path, base: Path) -> None:
    digest, fingerprint = BaseModel(pruned, "train.model").identify()
    assert fingerprint == BaseModel(base, "train.model").identify()[1]
    assert digest != fingerprint
