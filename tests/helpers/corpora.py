"""Small corpora, with documents in files of every format."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from helpers import tiny
from loram_ray.config import CorpusConfig, TextSource
from loram_ray.corpus.duplicates import (
    count_parts,
    duplicates_of,
    find_duplicates,
    write_hashes,
)
from loram_ray.corpus.prepare import prepare_unit
from loram_ray.corpus.read import BadRow, documents, list_units
from loram_ray.corpus.selection import Selection
from loram_ray.corpus.sources import Counts

LENGTH = 16


def read_all(path: Path | str, field: str = "text") -> list[str | BadRow]:
    units = list_units([TextSource(path=str(path), text_field=field)])
    return [document for unit in units for document in documents(unit)]


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESS = {"gz": gzip.compress, "zst": zstd}


def save_to_disk(folder: Path, texts: list[str], shards: int = 2) -> Path:
    """Write a dataset in the layout of ``datasets.Dataset.save_to_disk``."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    schema = pa.schema({"id": pa.int64(), "text": pa.string()})
    for number, name in enumerate(names):
        part = texts[len(texts) * number // shards : len(texts) * (number + 1) // shards]
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for start in range(0, len(part), 7):
                rows = part[start : start + 7]
                writer.write_batch(pa.record_batch([list(range(len(rows))), rows], schema=schema))
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return folder


TEXTS = [row["text"] for row in tiny.texts(40)] + ["ünïcödé – 日本語 😀", "two\nlines"]


def write_form(folder: Path, form: str) -> Path:
    """Write `TEXTS` in one of the supported formats."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    path = folder / f"data.{form}"
    kind, _, coding = form.partition(".")
    if coding:
        path.write_bytes(COMPRESS[coding](lines))
    elif kind == "jsonl":
        path.write_bytes(lines)
    elif kind == "parquet":
        pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=11)
    elif kind == "arrow":
        table = pa.table({"text": pa.array(TEXTS, pa.large_string())})
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
    else:
        save_to_disk(path, TEXTS)
    return path


FORMS = ["jsonl", "jsonl.gz", "jsonl.zst", "json.gz", "json.zst", "parquet", "arrow", "saved"]


def tokens_of(file: Path) -> list[int]:
    table = pq.read_table(file)
    rows = zip(table["input_ids"].to_pylist(), table["length"].to_pylist(), strict=True)
    return [token for ids, length in rows for token in ids[:length]]


def texts_of(files: tuple[Path, ...] | list[Path]) -> list[str]:
    """Return the documents of prepared files."""
    tokenizer = tiny.tokenizer()
    found = []
    for file in files:
        document: list[int] = []
        for token in tokens_of(file):
            if token == tokenizer.eos_token_id:
                found.append(tokenizer.decode(document))
                document = []
            else:
                document.append(token)
        assert not document
    return found


def prepare_here(
    config: CorpusConfig, work: Path, order: random.Random | None = None
) -> list[Counts]:
    """Prepare every unit in this process, in any order."""
    work.mkdir()
    units = list_units(config.sources)
    shuffled = list(units)
    if order:
        order.shuffle(shuffled)
    parts = 0
    if config.deduplicate:
        for unit in shuffled:
            write_hashes(unit, work, Selection.of(config, unit.source))
        parts = count_parts(work, len(units))
        for part in reversed(range(parts)):
            find_duplicates(part, parts, work, len(units))
    counts: dict[int, Counts] = {}
    for unit in shuffled:
        left_out = duplicates_of(unit.index, parts, work) if parts else None
        selection = Selection.of(config, unit.source)
        counts[unit.index] = prepare_unit(unit, work, LENGTH, tiny.tokenizer(), selection, left_out)
    return [counts[unit.index] for unit in units]


def repetitive(draw: random.Random, count: int) -> list[dict[str, str]]:
    return [
        {"text": f"text {draw.randrange(40)}" + " word" * draw.randrange(2)} for _ in range(count)
    ]
