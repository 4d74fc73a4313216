"""Documents changed at random: whatever a value becomes, a right result or one line."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from helpers.bad_inputs.harness import Row, check, copied, make_folder, stage

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 7, 1.5, -0.5, 10**9, 10**18, 10**30, 1e300, "", "a", "0", "\0",
    "a/b", "..", "a" * 10_000, [], [None], [1], ["a"], [[]], {}, {"a": None}, {"a": {"b": []}},
)  # fmt: skip
DOCUMENTS = {
    "base/config.json": stage("prune"),
    "base/generation_config.json": ("chat", "--model", "base", "--prompt", "?",
                                    "--max-new-tokens", "1"),
    "base/tokenizer_config.json": stage("train", "train.model=base"),
    "base/tokenizer.json": stage("train", "train.model=base"),
    "plain/adapter_config.json": stage("merge"),
    "run/pruned/manifest.json": stage("quantize"),
    "sharded/model.safetensors.index.json": stage("prune", "prune.base=sharded"),
    "results/results.json": ("report", "results"),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("whole") / "folder")


def changed(document: Any, draw: random.Random) -> Any:
    """The document with one value, anywhere in it, taken out or replaced."""
    places: list[tuple[Any, Any]] = []
    pending = [document]
    while pending:
        node = pending.pop()
        items = list(node.items()) if isinstance(node, dict) else list(enumerate(node))
        for key, value in items:
            places.append((node, key))
            if isinstance(value, dict | list):
                pending.append(value)
    node, key = draw.choice(places)
    if isinstance(node, dict) and draw.random() < 0.2:
        del node[key]
    else:
        node[key] = draw.choice(VALUES)
    return document


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.timeout(100)
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("path", DOCUMENTS)
def test_a_document_with_one_value_changed_is_read_or_refused_in_one_line(
    path: str,
    seed: int,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    draw = random.Random(f"{path} {seed}")

    def change(folder: Path) -> None:
        document = json.loads((folder / path).read_text())
        (folder / path).write_text(json.dumps(changed(document, draw)))

    row = Row(f"{path} {seed}", DOCUMENTS[path], "", change, may_work=True)
    check(row, copied(whole, tmp_path / "folder"), monkeypatch, capfd)
