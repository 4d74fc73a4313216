"""Folders of datasets: several splits or configurations are refused, honest folders are read."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers import tiny
from loram_ray.config import CalibrationConfig, CorpusConfig, SourceConfig, TextSource
from loram_ray.corpus.conversations import conversations
from loram_ray.corpus.files import EXAMPLES, list_files
from loram_ray.corpus.prepare import require_text
from loram_ray.errors import LoramError
from loram_ray.evaluation.prompts import rows_of
from loram_ray.pruning.text import calibration_sequences

TRAIN, TEST = "train-00000-of-00001.parquet", "test-00000-of-00001.parquet"


def lay_out(folder: Path, *names: str, readme: str | None = None) -> Path:
    """Write a row to each of some files."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pq.write_table(pa.table({"text": [name]}), path)
        else:
            path.write_text(json.dumps({"text": name}) + "\n")
    if readme is not None:
        (folder / "README.md").write_text(f"---\n{readme}\n---\n# A dataset\n")
    return folder


def refusal(path: Path | str, key: str = "key") -> str:
    with pytest.raises(LoramError) as caught:
        list_files(str(path), key, EXAMPLES)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def names_in(path: Path | str) -> list[str]:
    return [file.name for file in list_files(str(path), "key", EXAMPLES)]


SEVERAL = {
    "shards": (["data/" + TRAIN, "data/" + TEST], "train, test", "data/" + TRAIN),
    "files": (["train.jsonl", "test.jsonl"], "train, test", "train.jsonl"),
    "folders": (["train/a.jsonl", "train/b.jsonl", "test/a.jsonl"], "train, test", "train"),
    "validation": (["train.csv", "validation.csv"], "train, validation", "train.csv"),
    "dev": (["a-train.txt", "a-dev.txt"], "train, validation", "a-train.txt"),
    "eval": (["training_0.jsonl", "eval_0.jsonl"], "train, test", "training_0.jsonl"),
    "numbers": (["train0.tsv", "train1.tsv", "valid0.tsv"], "train, validation", "train*"),
    "spaces": (["my train set.txt", "my test set.txt"], "train, test", "my train set.txt"),
    "upper case": (["Train.csv", "Test.csv"], "train, test", "Train.csv"),
    "deep": (["x/y/val/a.txt", "x/y/train/a.txt"], "train, validation", "x/y/train/a.txt"),
    "no train": (["test.jsonl", "val.jsonl"], "validation, test", "val.jsonl"),
    "C4": (
        ["en/c4-train.00000-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz"],
        "train, validation",
        "en/c4-train.00000-of-01024.json.gz",
    ),
    "two shards": (
        [f"data/train-0000{i}-of-00002.parquet" for i in (0, 1)] + ["data/" + TEST],
        "train, test",
        "data/train-*",
    ),
    "another split": (
        ["data/" + TRAIN, "data/unsupervised-00000-of-00001.parquet"],
        "train, unsupervised",
        "data/" + TRAIN,
    ),
    "a file beside a folder": (["train/a.txt", "train/b.txt", "test.txt"], "train, test", "train"),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_a_folder_of_several_splits_is_refused_with_what_to_write(
    tmp_path: Path, kind: str
) -> None:
    names, splits, remedy = SEVERAL[kind]
    folder = lay_out(tmp_path / "repo", *names)
    expected = f"key must be one split of a dataset, but {folder} has {splits}; use {folder}/"
    assert refusal(folder) == expected + remedy
    # what it says to write is read, and is of one split
    chosen = names_in(f"{folder}/{remedy}")
    assert 0 < len(chosen) < len(names)
    assert refusal(f"file://{folder}").endswith(f"use file://{folder}/{remedy}")
    assert refusal(f"{folder}/**").startswith("key must be one split of a dataset")


HONEST = {
    "only train": ["data/" + TRAIN, "train/b.jsonl"],
    "only a test drive": ["test_drive.jsonl"],
    "a test drive and others": ["test_drive.jsonl", "road_trip.jsonl"],
    "words that hold a keyword": ["latest.jsonl", "contest.jsonl", "trainers.jsonl", "devil.txt"],
    "words in folders": ["attest/a.txt", "trains/b.txt", "evaluations/c.txt", "value/d.txt"],
    "shards of two texts": [f"{name}-00000-of-00001.parquet" for name in ("wiki", "books")],
    "shards of one text": [f"part-0000{i}-of-00002.parquet" for i in (0, 1)],
    "one split by two words": ["train/a.jsonl", "training/b.jsonl", "train_c.jsonl"],
    "files that are not read": ["train.jsonl", "test.md", ".test.jsonl", ".git/test.jsonl"],
}


@pytest.mark.parametrize("kind", HONEST)
def test_honest_folders_are_read_whole(tmp_path: Path, kind: str) -> None:
    folder = lay_out(tmp_path / "test" / "train", *HONEST[kind])
    read = [n for n in HONEST[kind] if not n.startswith(".") and not n.endswith(".md")]
    assert sorted(names_in(folder)) == sorted(name.rpartition("/")[2] for name in read)


def test_one_split_is_read_by_its_path_or_glob(tmp_path: Path) -> None:
    folder = lay_out(tmp_path, "data/" + TRAIN, "data/" + TEST, "data/more/test.jsonl")
    assert names_in(f"{folder}/data/train-*") == [TRAIN]
    assert names_in(f"{folder}/data/{TEST}") == [TEST]
    assert names_in(f"{folder}/**/test*") == ["test.jsonl", TEST]
    assert refusal(f"{folder}/data/t*").endswith(f"use {folder}/data/{TRAIN}")


def test_to_evaluate_the_test_split_is_suggested(tmp_path: Path) -> None:
    folder = lay_out(tmp_path, "train.jsonl", "val.jsonl", "test.jsonl")
    assert refusal(folder, "train.data").endswith(f"use {folder}/train.jsonl")
    assert refusal(folder, "evaluate.data").endswith(f"use {folder}/test.jsonl")
    assert refusal(folder, "train.eval_data").endswith(f"use {folder}/test.jsonl")


def test_every_key_that_names_data_refuses(tmp_path: Path, base: Path) -> None:
    path = str(lay_out(tmp_path / "repo", "data/" + TRAIN, "data/" + TEST))
    source = TextSource(path=path)
    calibration = CalibrationConfig(sources=(source,), samples=1, sequence_length=8)
    readers = {
        "train.data": lambda: list(conversations(path, "train.data")),
        "evaluate.data": lambda: rows_of(path, ["text"], "evaluate.data", None),
        "align.corpus.sources.0.path": lambda: require_text(
            CorpusConfig(sources=(SourceConfig(path=path),))
        ),
        "prune.calibration.sources.0.path": lambda: calibration_sequences(calibration, base, 0),
    }
    for key, reader in readers.items():
        with pytest.raises(LoramError, match=f"^{key} must be one split of a dataset"):
            reader()


SPLITS = """configs:
- config_name: default
  data_files:
  - split: train
    path: data/a-*
  - split: test
    path: [data/b.jsonl, data/c.jsonl]
"""
CONFIGURATIONS = """configs:
- config_name: en
  data_files: en/*.jsonl
- config_name: fr
  data_files:
  - {split: train, path: "fr/a.jsonl"}
  - {split: test, path: "fr/b.jsonl"}
"""


def test_a_readme_declares_the_splits(tmp_path: Path) -> None:
    names = ["data/a-0.jsonl", "data/a-1.jsonl", "data/b.jsonl", "data/c.jsonl"]
    folder = lay_out(tmp_path / "repo", *names, readme=SPLITS)
    said = f"has train, test; use {folder}/data/a-*"
    assert refusal(folder) == f"key must be one split of a dataset, but {folder} {said}"
    assert said in refusal(f"{folder}/**/*.jsonl")
    # of a folder inside, by the README above
    assert refusal(folder / "data").endswith(f"has train, test; use {folder}/data/a-*")
    assert names_in(f"{folder}/data/a-*") == ["a-0.jsonl", "a-1.jsonl"]
    assert names_in(f"{folder}/data/[bc].jsonl") == ["b.jsonl", "c.jsonl"]


def test_paths_that_are_relative_are_answered_with_relative_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["data/a-0.jsonl", "data/a-1.jsonl", "data/b.jsonl"]
    lay_out(tmp_path / "repo", *names, readme=SPLITS)
    monkeypatch.chdir(tmp_path)
    assert refusal("repo").endswith("repo has train, test; use repo/data/a-*")
    assert refusal("repo/data").endswith("has train, test; use repo/data/a-*")
    monkeypatch.chdir(tmp_path / "repo")
    assert refusal("*/*").endswith("has train, test; use data/a-*")
    assert names_in("data/a-*") == ["a-0.jsonl", "a-1.jsonl"]


def test_a_readme_declares_configurations(tmp_path: Path) -> None:
    names = ["en/a.jsonl", "en/b.jsonl", "fr/a.jsonl", "fr/b.jsonl"]
    folder = lay_out(tmp_path / "repo", *names, readme=CONFIGURATIONS)
    assert refusal(folder) == (
        f"key must be one configuration of a dataset, but {folder} has en, fr; use {folder}/en"
    )
    assert names_in(folder / "en") == ["a.jsonl", "b.jsonl"]
    assert refusal(folder / "fr").endswith(f"has train, test; use {folder}/fr/a.jsonl")


def test_configurations_by_folder_are_told_apart(tmp_path: Path) -> None:
    readme = "configs:\n- {config_name: a, data_dir: a}\n- {config_name: b, data_dir: b}\n"
    folder = lay_out(tmp_path, "a/train.txt", "a/test.txt", "b/train.txt", readme=readme)
    assert refusal(folder).endswith(f"has a, b; use {folder}/a/train.txt")
    assert refusal(folder / "a").endswith(f"has train, test; use {folder}/a/train.txt")


@pytest.mark.parametrize(
    "readme",
    [
        "configs:\n- {config_name: default, data_files: '**/*.jsonl'}",
        "configs:\n- {config_name: all, data_files: '*.jsonl'}\n- {config_name: b, data_files: b*}",
        "configs:\n- data_files: [{split: train, path: [train.jsonl, test_drive.jsonl]}]",
    ],
)
def test_what_a_readme_declares_as_one_split_is_one(tmp_path: Path, readme: str) -> None:
    lay_out(tmp_path, "train.jsonl", "test_drive.jsonl", readme=readme)
    assert len(names_in(tmp_path)) == 2


@pytest.mark.parametrize(
    "readme",
    [
        "no: configs",
        "configs: 5",
        "configs: [5, {data_files: 5}, {data_files: [1, {}]}, {data_files: {test: 7}}]",
        "configs: [*missing]",
        "- [",
        "configs:\n- data_files: [{split: train, path: train.jsonl}]",
        "a: &a [x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]\n"
        "c: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b]\nd: &d [*c, *c, *c, *c, *c, *c, *c, *c]\n"
        "configs: [*d, *d, *d, *d, *d, *d, *d, *d, *d, *d]",
    ],
)
def test_where_a_readme_says_nothing_of_use_the_names_count(tmp_path: Path, readme: str) -> None:
    lay_out(tmp_path, "train.jsonl", "test.jsonl", readme=readme)
    assert "has train, test; use" in refusal(tmp_path)


def test_saved_datasets_are_told_apart_by_their_states(tmp_path: Path) -> None:
    schema = pa.schema({"text": pa.string()})
    for name, split in (("one", "train"), ("two", "test[:10%]")):
        (tmp_path / name).mkdir()
        path = str(tmp_path / name / "data-00000-of-00001.arrow")
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            writer.write_batch(pa.record_batch([["a"]], schema=schema))
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": split}
        (tmp_path / name / "state.json").write_text(json.dumps(state))
    said = f"has train, test; use {tmp_path}/one/data-00000-of-00001.arrow"
    assert said in refusal(tmp_path)
    assert len(names_in(tmp_path / "two")) == 1


@pytest.mark.parametrize("content", ['{"splits": 5}', "[]", '{"splits": [1, null]}'])
def test_a_dictionary_of_datasets_is_refused_whatever_it_holds(
    tmp_path: Path, content: str
) -> None:
    lay_out(tmp_path, "train/a.jsonl")
    (tmp_path / "dataset_dict.json").write_text(content)
    assert "must be one split of a dataset" in refusal(tmp_path)


def test_the_test_rows_are_not_learnt(tmp_path: Path) -> None:
    folder = tmp_path / "repo"
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        tiny.write_jsonl(folder / split / "rows.jsonl", [{"prompt": split, "completion": "x"}])
    with pytest.raises(LoramError, match="train.data must be one split"):
        list(conversations(str(folder), "train.data"))
    [row] = conversations(str(folder / "train"), "train.data")
    assert "train" in repr(row)
