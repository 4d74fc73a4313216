"""Tokenise and pack a corpus once, with Ray Data, into Parquet files with stable row ids.

Each unit of the corpus becomes one Parquet file with a fixed name, order and content. The result
therefore does not depend on the number of tasks, and an interrupted preparation can continue.
Held-out rows go to separate files.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from loram_ray.artifacts.manifest import digest_of, hash_file, read_manifest, write_json
from loram_ray.artifacts.stage_directory import StageDirectory, StageResult, run_stage
from loram_ray.config import CorpusConfig
from loram_ray.corpus.duplicates import (
    count_parts,
    duplicates_file_of,
    duplicates_of,
    find_duplicates,
    hash_file_of,
    write_hashes,
)
from loram_ray.corpus.pack import PackedFile
from loram_ray.corpus.read import (
    CORPUS_KEY,
    NAMED_BAD_ROWS,
    BadRow,
    Unit,
    identify,
    list_units,
    refuse_bad_rows,
)
from loram_ray.corpus.selection import Selection
from loram_ray.corpus.sources import Counts, SourceInfo, write_sources
from loram_ray.corpus.spread import map_items
from loram_ray.errors import LoramError
from loram_ray.models.tokenizer import frame_of, load_tokenizer
from loram_ray.utils.parsing import parse_json
from loram_ray.utils.parsing.documents import as_type, read_as

QUARANTINE_FILE = "quarantine.jsonl"
ROWS_PER_GROUP = 32
_UNIT_BITS = 32
_HELD_OUT_BIT = 31
_TOKENIZER_FILES = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.tiktoken",
)


def prepare_corpus(config: CorpusConfig, model: Path, output: Path) -> StageResult:
    """Tokenise and pack a corpus with a model's tokenizer, reusing a complete result.

    Ray must be initialised. Use `loram_ray.corpus.sources.list_sources` to read the result.

    Args:
        config: Sources, filters and sequence length.
        model: Directory of the model that provides the tokenizer.
        output: Directory to write.

    Raises:
        LoramError: If a source has no text, a file is damaged, the tokenizer is unusable, or the
            share of unreadable rows exceeds the configured limit.
    """
    config = config.resolved()
    units = require_text(config)
    frame = frame_of(load_tokenizer(model))  # fail here rather than in a worker
    tokenizer = digest_of_tokenizer(model)
    _refuse_other_tokenizer(output, model, tokenizer)
    return run_stage(
        output,
        "corpus",
        settings={**_settings(config), **frame.settings},
        parents={"tokenizer": tokenizer},
        base_fingerprint="",
        write=lambda target: _write(target, config, model, units),
        reads=[source.path for source in config.sources],
    )


def require_text(config: CorpusConfig) -> list[Unit]:
    """Return the corpus's units of work; Ray is not needed.

    Raises:
        LoramError: If there are no files, or all files of a source are empty.
    """
    units = list_units(config.sources)
    if not units:
        raise LoramError(f"{CORPUS_KEY} must contain text, but every file is empty; add some")
    for number in range(len(config.sources)):
        if not any(unit.source == number for unit in units):
            raise LoramError(
                f"{_key_of(config, number)} must contain text, but every file is empty; add some "
                "or remove the source"
            )
    return units


def digest_of_tokenizer(model: Path) -> str:
    """Return the digest of a model directory's tokenizer files."""
    files = {path for pattern in _TOKENIZER_FILES for path in model.glob(pattern)}
    return digest_of([[path.name, hash_file(path)] for path in sorted(files)])


def _settings(config: CorpusConfig) -> dict[str, Any]:
    sources = [
        {
            **source.identity(),
            "name": name,
            "files": identify([source]),
        }
        for source, name in zip(config.sources, config.names(), strict=True)
    ]
    return {**config.identity(), "sources": sources}


def _refuse_other_tokenizer(output: Path, model: Path, tokenizer: str) -> None:
    manifest = read_manifest(output) if output.is_dir() else None
    if manifest is None or manifest.stage != "corpus":
        return
    other = manifest.parents.get("tokenizer", "")
    if other != tokenizer:
        raise LoramError(
            f"{output} must be tokenised with the tokenizer of {model} ({tokenizer[:12]}), but "
            f"contains a corpus of another tokenizer ({other[:12]}); move it away to prepare it "
            "again, or choose another output"
        )


def _key_of(config: CorpusConfig, number: int) -> str:
    return f"{CORPUS_KEY}.{number} ({config.names()[number]})"


def _write(target: StageDirectory, config: CorpusConfig, model: Path, units: list[Unit]) -> None:
    parts = _compare_documents(target.work, config, units) if config.deduplicate else 0
    map_items(
        "corpus",
        "unit",
        {target.work / _counts_file(unit.index): asdict(unit) for unit in units},
        _prepare_item,
        (target.work, config, model.resolve(), parts),
    )
    counts = [read_as(target.work / _counts_file(unit.index), Counts) for unit in units]
    total = Counts.sum(counts)
    bad = _collect_bad_rows(target.work, units, target.path / QUARANTINE_FILE)
    key = "align.corpus.max_bad_share"
    refuse_bad_rows(bad, total.rows, config.max_bad_share, key, total.bad_rows)
    sources = _describe_sources(target.path, config, units, counts)
    for source in sources:
        for path in (*source.unit_files, *source.held_out_files):
            os.link(target.work / path.name, path)  # an interrupted run reuses its units
    write_sources(target.path, sources)
    target.details.update(asdict(total))


def _compare_documents(work: Path, config: CorpusConfig, units: list[Unit]) -> int:
    """Find the duplicates in the whole corpus; return the number of parts."""
    hashes = {hash_file_of(work, unit.index): asdict(unit) for unit in units}
    map_items("hash", "unit", hashes, _hash_item, (work, config))
    parts = count_parts(work, len(units))
    found = {duplicates_file_of(work, part): {"part": part} for part in range(parts)}
    map_items("compare", "part", found, _compare_item, (parts, work, len(units)))
    return parts


def _describe_sources(
    directory: Path, config: CorpusConfig, units: list[Unit], counts: list[Counts]
) -> list[SourceInfo]:
    """Return the description of each prepared source.

    Raises:
        LoramError: If a source has no documents left to train on.
    """
    together = sum(count.sequences for count in counts)
    weights = sum(source.weight or 0.0 for source in config.sources)
    sources = []
    for number, (source, name) in enumerate(zip(config.sources, config.names(), strict=True)):
        mine = [unit.index for unit in units if unit.source == number]
        total = Counts.sum(counts[index] for index in mine)
        if not total.sequences:
            raise LoramError(
                f"{_key_of(config, number)} must contain text, but none of its {total.rows} rows "
                f"is left to train on ({total.filtered} filtered, {total.duplicates} duplicates, "
                f"{total.held_out_documents} held out, {total.bad_rows} bad); add some or remove "
                "the source"
            )
        held_out = [directory / _held_out_file(index) for index in mine]
        sources.append(
            SourceInfo(
                **asdict(total),
                name=name,
                weight=source.weight,
                share=source.weight / weights if source.weight else total.sequences / together,
                unit_files=tuple(directory / _unit_file(index) for index in mine),
                held_out_files=tuple(held_out if source.held_out else ()),
            )
        )
    return sources


def _hash_item(item: dict[str, Any], work: Path, config: CorpusConfig) -> None:
    unit = Unit(**item)
    write_hashes(unit, work, Selection.of(config, unit.source))


def _compare_item(item: dict[str, Any], parts: int, work: Path, units: int) -> None:
    find_duplicates(item["part"], parts, work, units)


def _prepare_item(
    item: dict[str, Any], work: Path, config: CorpusConfig, model: Path, parts: int
) -> None:
    unit = Unit(**item)
    duplicates = duplicates_of(unit.index, parts, work) if parts else None
    selection = Selection.of(config, unit.source)
    prepare_unit(unit, work, config.sequence_length, _tokenizer_of(model), selection, duplicates)


@functools.cache
def _tokenizer_of(model: Path) -> Any:
    """Load the tokenizer once per worker process; each task runs on one core."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return load_tokenizer(model)


def prepare_unit(
    unit: Unit,
    work: Path,
    sequence_length: int,
    tokenizer: Any,
    selection: Selection | None = None,
    duplicates: np.ndarray | None = None,
) -> Counts:
    """Tokenise and pack one unit into ``work``; the counts file, written last, marks it complete.

    Args:
        unit: Unit to read.
        work: Directory for the files.
        sequence_length: Number of tokens per sequence.
        tokenizer: Tokenizer of the model.
        selection: Rules that keep and hold out documents; None keeps all.
        duplicates: Sorted positions of duplicates among the documents that pass the filters.
    """
    selection = selection or Selection()
    files = [_packed_file(work / _unit_file(unit.index), unit, tokenizer, sequence_length)]
    if selection.held_out:
        path = work / _held_out_file(unit.index)
        files.append(_packed_file(path, unit, tokenizer, sequence_length, held_out=True))
    documents, filtered, repeated, bad = [0, 0], 0, 0, 0
    place, left_out = 0, iter(() if duplicates is None else duplicates)
    next_left_out = next(left_out, None)
    with open(work / _bad_file(unit.index), "w") as quarantine:
        for document in selection.documents(unit):
            if document is None:
                filtered += 1
                continue
            if isinstance(document, BadRow):
                quarantine.write(json.dumps(asdict(document)) + "\n")
                bad += 1
                continue
            if place == next_left_out:
                next_left_out = next(left_out, None)
                repeated += 1
            else:
                held_out = selection.holds_out(document)
                files[held_out].add(document)
                documents[held_out] += 1
            place += 1
    for file in files:
        file.close()
    counts = Counts(
        documents=documents[False],
        sequences=files[0].sequences,
        tokens=files[0].tokens,
        held_out_documents=documents[True],
        held_out_sequences=sum(file.sequences for file in files[1:]),
        held_out_tokens=sum(file.tokens for file in files[1:]),
        filtered=filtered,
        duplicates=repeated,
        bad_rows=bad,
    )
    write_json(work / _counts_file(unit.index), asdict(counts))
    return counts


def _packed_file(
    path: Path, unit: Unit, tokenizer: Any, sequence_length: int, held_out: bool = False
) -> PackedFile:
    first = (unit.index << _UNIT_BITS) + (int(held_out) << _HELD_OUT_BIT)
    return PackedFile(path, tokenizer, sequence_length, ROWS_PER_GROUP, first)


def _collect_bad_rows(work: Path, units: list[Unit], quarantine: Path) -> list[BadRow]:
    """Concatenate the units' bad rows into one file, if any, and return the first few."""
    with open(quarantine, "wb") as joined:
        for unit in units:
            with open(work / _bad_file(unit.index), "rb") as file:
                shutil.copyfileobj(file, joined)
    with open(quarantine) as file:
        first = [_bad_row(line, quarantine) for line in islice(file, NAMED_BAD_ROWS)]
    if not first:
        quarantine.unlink()
    return first


def _bad_row(line: str, path: Path) -> BadRow:
    entry: dict[str, Any] = parse_json(line, str(path))
    return as_type(BadRow, entry, str(path))


def _unit_file(index: int) -> str:
    return f"unit-{index:06d}.parquet"


def _held_out_file(index: int) -> str:
    return f"held_out-{index:06d}.parquet"


def _counts_file(index: int) -> str:
    return f"unit-{index:06d}.json"


def _bad_file(index: int) -> str:
    return f"bad-{index:06d}.jsonl"
