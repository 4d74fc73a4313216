"""Parquet and Arrow files that would run code when read: every reader refuses them before."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data  # noqa: F401  registers the extension type whose values are unpickled
from ray.data.extensions import ArrowPythonObjectArray, ArrowTensorArray

from helpers import tiny
from loram_ray.alignment.targets import read_targets, target_file
from loram_ray.config import CalibrationConfig, CorpusConfig, SourceConfig, TextConfig, TextSource
from loram_ray.corpus.columnar import arrow_batches, open_parquet
from loram_ray.corpus.conversations import conversations
from loram_ray.corpus.order import Block
from loram_ray.corpus.prepare import prepare_corpus, require_text
from loram_ray.corpus.read import documents, list_units
from loram_ray.corpus.stream import read_block
from loram_ray.errors import LoramError
from loram_ray.evaluation.perplexity import perplexity_of_text
from loram_ray.evaluation.prompts import rows_of
from loram_ray.pruning.text import calibration_sequences

FORMS = ("a.parquet", "a.file.arrow", "a.stream.arrow")


class Trap:
    """Unpickled, it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """The file that no reader may create."""
    path = tmp_path / "code ran"
    yield path
    assert not path.exists()


def trapped(marker: Path) -> pa.Array:
    """A column of two values that run code when they are read."""
    values = np.empty(2, dtype=object)
    values[:] = [Trap(marker), Trap(marker)]
    return ArrowPythonObjectArray.from_objects(values)


def write(path: Path, table: pa.Table) -> Path:
    """Write a table in the form that a name ends with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return path
    new = pa.ipc.new_file if ".file" in path.name else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table)
    return path


def read(path: Path) -> pa.Table:
    if path.suffix == ".parquet":
        return open_parquet(path, path.name).read()
    with pa.OSFile(str(path)) as file:
        return pa.Table.from_batches(arrow_batches(file, path.name))


def test_what_is_refused_runs_code_in_a_plain_reader(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    write(tmp_path / "a.parquet", pa.table({"text": trapped(marker)}))
    pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert marker.exists()


@pytest.mark.parametrize("form", FORMS)
def test_every_reader_refuses_a_column_of_pickled_objects(
    tmp_path: Path, base: Path, marker: Path, form: str
) -> None:
    columns = ("text", "prompt", "completion", "messages", "question")
    path = str(write(tmp_path / "data" / form, pa.table(dict.fromkeys(columns, trapped(marker)))))
    sources = (TextSource(path=path),)
    config = CorpusConfig(sources=(SourceConfig(path=path),))
    calibration = CalibrationConfig(sources=sources, samples=1, sequence_length=8)
    text = TextConfig(sources=sources, max_bad_share=1.0)
    readers: dict[str, Callable[[], object]] = {
        "corpus": lambda: [list(documents(unit)) for unit in require_text(config)],
        "calibration": lambda: calibration_sequences(calibration, base, 0),
        "training": lambda: list(conversations(path, "train.data")),
        "benchmark": lambda: rows_of(path, ["question"], "evaluate.data", None),
        "perplexity": lambda: perplexity_of_text("x", tiny.tokenizer(), text, "evaluate.text"),
    }
    for name, reader in readers.items():
        with pytest.raises(LoramError) as caught:
            reader()
        assert str(caught.value) == (
            f"{path} must have columns of plain types, but 'text' has the extension type "
            "'ray.data.arrow_pickled_object', and reading it could run code; write the file "
            "without that column"
        ), name


@pytest.mark.cluster
@pytest.mark.usefixtures("embedded_ray")
@pytest.mark.parametrize("form", FORMS)
def test_a_corpus_with_pickled_objects_is_not_prepared(
    tmp_path: Path, base: Path, marker: Path, form: str
) -> None:
    path = write(tmp_path / "data" / form, pa.table({"text": trapped(marker)}))
    config = CorpusConfig(sources=(SourceConfig(path=str(path)),))
    with pytest.raises(LoramError, match=r"^[^\n]*must have columns of plain types[^\n]*$"):
        prepare_corpus(config, base, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_prepared_rows_and_targets_with_pickled_objects_are_refused(
    tmp_path: Path, marker: Path
) -> None:
    path = write(tmp_path / "unit-000000.parquet", pa.table({"input_ids": trapped(marker)}))
    block = Block(str(path), 0, 2)
    with pytest.raises(LoramError, match="must have columns of plain types, but 'input_ids'"):
        read_block(block)
    write(tmp_path / target_file(block), pa.table({"token_ids": trapped(marker)}))
    with pytest.raises(LoramError, match="must have columns of plain types, but 'token_ids'"):
        read_targets(tmp_path, block, np.array([0]))


def nested(column: pa.Array) -> dict[str, pa.Array]:
    """A column inside each nested type, by the name in the message."""
    two = pa.array([0, 1, 2], pa.int32())
    struct = pa.StructArray.from_arrays([column, pa.array([1, 2])], names=["inner", "number"])
    return {
        "c": column,
        "c.inner": struct,
        "c.item": pa.ListArray.from_arrays(two, column),
        "c.entries.value": pa.MapArray.from_arrays(two, pa.array(["a", "b"]), column),
        "c.item.inner": pa.ListArray.from_arrays(two, struct),
    }


@pytest.mark.parametrize("form", FORMS)
def test_an_extension_type_is_found_wherever_it_is_nested(
    tmp_path: Path, marker: Path, form: str
) -> None:
    for number, (name, column) in enumerate(nested(trapped(marker)).items()):
        table = pa.table({"text": ["a", "b"], "c": column})
        path = write(tmp_path / str(number) / form, table)
        with pytest.raises(LoramError, match=f"'{name}' has the extension type 'ray.data"):
            read(path)
        # a column that would not be read is refused too
        with pytest.raises(LoramError, match="must have columns of plain types"):
            [list(documents(unit)) for unit in list_units([TextSource(path=str(path))])]


def test_an_extension_type_is_found_in_a_dictionary_and_a_union(
    tmp_path: Path, marker: Path
) -> None:
    column = trapped(marker)
    tags = pa.array([0, 0], pa.int8())
    union = pa.UnionArray.from_sparse(tags, [column], ["only"])
    with pytest.raises(LoramError, match=r"'c.only' has the extension type"):
        read(write(tmp_path / "u.file.arrow", pa.table({"c": union})))
    struct = pa.StructArray.from_arrays([column], names=["inner"])
    encoded = pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int32()), struct)
    for form in FORMS[1:]:
        with pytest.raises(LoramError, match="must have columns of plain types"):
            read(write(tmp_path / f"d.{form}", pa.table({"c": encoded})))


@pytest.mark.parametrize("form", FORMS)
def test_other_extension_types_are_refused_too(tmp_path: Path, form: str) -> None:
    tensors = ArrowTensorArray.from_numpy(np.zeros((2, 3)))
    uuids = pa.array([b"0" * 16] * 2, pa.uuid())
    for number, column in enumerate((tensors, uuids)):
        path = write(tmp_path / str(number) / form, pa.table({"c": column}))
        with pytest.raises(LoramError, match="'c' has the extension type"):
            read(path)


class Rebuilt(pa.ExtensionType):
    """A type that runs code as soon as a schema is read."""

    rebuilt = 0

    def __init__(self) -> None:
        super().__init__(pa.string(), "tests.rebuilt")

    def __arrow_ext_serialize__(self) -> bytes:
        return b"parameters"

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, serialised: bytes) -> Rebuilt:
        cls.rebuilt += 1
        return cls()


@pytest.fixture
def rebuilt() -> Iterator[type[Rebuilt]]:
    pa.register_extension_type(Rebuilt())
    yield Rebuilt
    pa.unregister_extension_type("tests.rebuilt")


def test_no_class_rebuilds_a_type_before_it_is_refused(
    tmp_path: Path, rebuilt: type[Rebuilt]
) -> None:
    column = pa.ExtensionArray.from_storage(Rebuilt(), pa.array(["a", "b"]))
    for form in FORMS:
        path = write(tmp_path / form, pa.table({"c": column}))
        rebuilt.rebuilt = 0
        with pytest.raises(LoramError, match="'c' has the extension type 'tests.rebuilt'"):
            read(path)
        assert rebuilt.rebuilt == 0
    pq.ParquetFile(tmp_path / FORMS[0])
    assert rebuilt.rebuilt > 0  # Arrow alone would have run it


def test_a_second_schema_in_a_footer_hides_nothing(tmp_path: Path, rebuilt: type[Rebuilt]) -> None:
    def message(kind: pa.DataType) -> bytes:
        return base64.b64encode(pa.schema({"c": kind}).serialize().to_pybytes())

    honest, hostile = message(pa.string()), message(Rebuilt())
    for order in ((honest, hostile), (hostile, honest)):
        metadata = {b"ARROW:schemA": order[0], b"ARROW:schemB": order[1]}
        table = pa.table({"c": ["a", "b"]})
        path = tmp_path / "two.parquet"
        with pq.ParquetWriter(path, table.schema, store_schema=False) as writer:
            writer.write_table(table)
            writer.add_key_value_metadata(metadata)
        content = path.read_bytes()
        for letter in (b"A", b"B"):
            content = content.replace(b"ARROW:schem" + letter, b"ARROW:schema")
        path.write_bytes(content)
        rebuilt.rebuilt = 0
        with pytest.raises(LoramError, match="must have columns of plain types"):
            read(path)
        assert rebuilt.rebuilt == 0


@pytest.mark.parametrize("form", FORMS)
def test_plain_types_are_read_as_arrow_reads_them(tmp_path: Path, form: str) -> None:
    table = pa.table(
        {
            "text": pa.array(["a", None, "c"], pa.large_string()),
            "pair": pa.array([[1, 2]] * 3, pa.list_(pa.int32(), 2)),
            "messages": [[{"role": "user", "content": "x"}]] * 3,
            "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
            "when": pa.array([1, 2, 3], pa.timestamp("ms", tz="UTC")),
        }
    )
    path = write(tmp_path / form, table)
    assert read(path).equals(table)
    assert read(path).schema == table.schema


def test_a_wide_footer_is_read_whole(tmp_path: Path) -> None:
    table = pa.table({f"column {number} {'x' * 200}": [number] for number in range(2000)})
    path = write(tmp_path / "wide.parquet", table)
    assert path.stat().st_size > 2 * 2**16
    assert read(path).equals(table)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PAR1",
        b"ARROW1",
        b"no table" * 9,
        b"PAR1" + b"\xff" * 8 + b"PAR1",
        b"PAR1" + b"\0" * 8 + b"PAR1",
        b"ARROW1\0\0\xff\xff\xff\x7fARROW1",
        b"PAR1\0\0PARE",
    ],
)
def test_what_is_not_a_table_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    for name in ("a.parquet", "a.arrow"):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(LoramError) as caught:
            list(conversations(str(path), "key"))
        assert len(str(caught.value).splitlines()) == 1


def test_a_fifo_in_place_of_a_parquet_file_blocks_nobody(tmp_path: Path) -> None:
    path = tmp_path / "unit-000000.parquet"
    os.mkfifo(path)
    with pytest.raises(LoramError, match="must be a regular file, got a FIFO"):
        open_parquet(path, str(path))
