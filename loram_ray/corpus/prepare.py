"""A corpus tokenised and packed once, by Ray Data, into Parquet with stable row ids.

Each unit of the corpus becomes one Parquet file with a name, an order and a content of its own, so
the result is the same however many tasks made it, and an interrupted preparation continues.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from loram_ray.config import CorpusConfig
from loram_ray.corpus.pack import end_of_text, pack, tokenise
from loram_ray.corpus.read import (
    BadRow,
    Unit,
    documents,
    identify,
    list_units,
    refuse_bad_rows,
)
from loram_ray.errors import LoramError
from loram_ray.manifest import digest_of, hash_file, write_json
from loram_ray.modeling import load_tokenizer
from loram_ray.progress import Reporter
from loram_ray.stage import StageDirectory, StageResult, run_stage

QUARANTINE_FILE = "quarantine.jsonl"
ROWS_PER_GROUP = 256
_UNIT_BITS = 32
_TOKENIZER_FILES = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json")


@dataclass(frozen=True)
class UnitSummary:
    """What one unit of a corpus became."""

    index: int
    sequences: int
    tokens: int
    documents: int
    bad: int


def prepare_corpus(config: CorpusConfig, model: Path, output: Path) -> StageResult:
    """Tokenise and pack a corpus with a model's tokenizer; reuse what is complete.

    Ray must be initialised.

    Args:
        config: sources and sequence length.
        model: model directory whose tokenizer is used.
        output: directory to write.

    Raises:
        LoramError: no text, no usable tokenizer, or more unreadable rows than the configured share.
    """
    config = config.resolved()
    units = require_text(config)
    settings = {
        "sources": identify(config.sources),
        "sequence_length": config.sequence_length,
        "max_bad_share": config.max_bad_share,
    }
    end_of_text(load_tokenizer(model))  # a worker would find out too late to say so clearly
    return run_stage(
        output,
        "corpus",
        settings=settings,
        parents={"tokenizer": digest_of_tokenizer(model)},
        base_fingerprint="",
        write=lambda target: _write(target, config, model, units),
    )


def require_text(config: CorpusConfig) -> list[Unit]:
    """Return the corpus's units of work; needs no Ray.

    Raises:
        LoramError: there are no files, or every one is empty.
    """
    units = list_units(config.sources)
    if not units:
        raise LoramError("align.corpus.sources must hold text, every file is empty; add some")
    return units


def digest_of_tokenizer(model: Path) -> str:
    """Digest of the tokenizer files of a model directory."""
    files = {path for pattern in _TOKENIZER_FILES for path in model.glob(pattern)}
    return digest_of([[path.name, hash_file(path)] for path in sorted(files)])


def _write(target: StageDirectory, config: CorpusConfig, model: Path, units: list[Unit]) -> None:
    summaries = _run_units(target.work, config.sequence_length, model, units)
    bad = _collect_bad_rows(target.work, target.path / QUARANTINE_FILE)
    total = sum(s.documents + s.bad for s in summaries)
    refuse_bad_rows(bad, total, config.max_bad_share, "align.corpus.max_bad_share")
    sequences = sum(s.sequences for s in summaries)
    if sequences == 0:
        raise LoramError("align.corpus.sources must hold text, no document was found; add some")
    for unit in units:
        name = _unit_file(unit.index)
        os.link(target.work / name, target.path / name)  # a cut run finds its units again
    target.details.update(
        sequences=sequences,
        tokens=sum(s.tokens for s in summaries),
        documents=sum(s.documents for s in summaries),
        bad_rows=len(bad),
    )


def _run_units(
    work: Path, sequence_length: int, model: Path, units: list[Unit]
) -> list[UnitSummary]:
    """Prepare the units that an earlier attempt did not, spread over the cluster by Ray Data."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its progress goes to its log file
    pending = [asdict(u) for u in units if not (work / _summary_file(u.index)).exists()]
    with Reporter("corpus", total=len(units), unit="unit") as reporter:
        reporter.update(len(units) - len(pending), {})
        if pending:
            dataset = ray.data.from_items(pending, override_num_blocks=len(pending)).map_batches(
                _prepare_batch,
                fn_args=(work, sequence_length, model.resolve()),
                batch_size=1,
                num_cpus=1,
            )
            for batch in dataset.iter_batches(batch_size=None):
                for number in batch["errno"][batch["errno"] > 0]:
                    raise OSError(int(number), os.strerror(number))
                reporter.advance(len(batch["errno"]))
    loaded = [json.loads((work / _summary_file(u.index)).read_text()) for u in units]
    return [UnitSummary(**summary) for summary in loaded]


def _prepare_batch(
    batch: dict[str, np.ndarray], work: Path, sequence_length: int, model: Path
) -> dict[str, np.ndarray]:
    """Prepare one unit in a Ray Data task; the batch has the fields of `Unit`.

    An error of the disk is returned: Ray Data would hide what it was.
    """
    unit = Unit(
        index=int(batch["index"][0]),
        path=str(batch["path"][0]),
        field=str(batch["field"][0]),
        start=int(batch["start"][0]),
        end=int(batch["end"][0]),
    )
    try:
        prepare_unit(unit, work, sequence_length, _tokenizer_of(model))
    except OSError as error:
        if error.errno is None:
            raise
        return {"errno": np.array([error.errno])}
    return {"errno": np.array([0])}


@functools.cache
def _tokenizer_of(model: Path) -> Any:
    """The tokenizer, loaded once in a worker process, which does many tasks."""
    return load_tokenizer(model)


def prepare_unit(unit: Unit, work: Path, sequence_length: int, tokenizer: Any) -> UnitSummary:
    """Tokenise and pack one unit into ``work``; the summary, written last, makes it complete."""
    bad: list[BadRow] = []
    count = 0

    def good_documents():  # type: ignore[no-untyped-def]  # a generator of str
        nonlocal count
        for document in documents(unit):
            if isinstance(document, BadRow):
                bad.append(document)
            else:
                count += 1
                yield document

    tokens = tokenise(tokenizer, good_documents())
    sequences, lengths = pack(tokens, sequence_length, end_of_text(tokenizer))
    row_ids = (unit.index << _UNIT_BITS) + np.arange(len(sequences), dtype=np.int64)
    flat = pa.array(sequences.reshape(-1))
    table = pa.table(
        {
            "row_id": row_ids,
            "input_ids": pa.FixedSizeListArray.from_arrays(flat, sequence_length),
            "length": lengths,
        }
    )
    path = work / _unit_file(unit.index)
    pq.write_table(table, path.with_suffix(".tmp"), row_group_size=ROWS_PER_GROUP)
    path.with_suffix(".tmp").replace(path)
    write_json(work / _bad_file(unit.index), [asdict(row) for row in bad])
    summary = UnitSummary(unit.index, len(sequences), int(lengths.sum()), count, len(bad))
    write_json(work / _summary_file(unit.index), asdict(summary))
    return summary


def _collect_bad_rows(work: Path, quarantine: Path) -> list[BadRow]:
    rows = []
    for path in sorted(work.glob("bad-*.json")):
        rows += [BadRow(**entry) for entry in json.loads(path.read_text())]
    if rows:
        quarantine.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    return rows


def _unit_file(index: int) -> str:
    return f"unit-{index:06d}.parquet"


def _summary_file(index: int) -> str:
    return f"unit-{index:06d}.json"


def _bad_file(index: int) -> str:
    return f"bad-{index:06d}.json"
