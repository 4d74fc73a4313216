"""Corpora of several sources, prepared completely: distinguished, resumed, and changes detected."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from helpers import tiny
from helpers.corpora import (
    LENGTH,
    TEXTS,
    prepare_here,
    repetitive,
    save_to_disk,
    texts_of,
    tokens_of,
    write_form,
)
from loram_ray.config import CorpusConfig, FilterConfig, SourceConfig
from loram_ray.corpus import read
from loram_ray.corpus.prepare import QUARANTINE_FILE, prepare_corpus
from loram_ray.corpus.read import list_units
from loram_ray.corpus.sources import list_sources
from loram_ray.errors import LoramError


@pytest.fixture
def several(tmp_path: Path) -> CorpusConfig:
    """Three sources in four units, with copies, short documents and a bad row."""
    draw = random.Random(5)
    web = [*repetitive(draw, 150), *tiny.texts(60)]
    tiny.write_jsonl(tmp_path / "web.jsonl", web)
    code = [{"text": "short"}, *repetitive(draw, 80), *tiny.texts(70)[30:]]
    lines = [json.dumps(row) for row in code]
    lines.insert(17, "{")
    (tmp_path / "code.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    save_to_disk(tmp_path / "maths", [f"theorem {i} of {i % 9}" for i in range(60)])
    return CorpusConfig(
        sources=(
            SourceConfig(path=str(tmp_path / "web.jsonl"), weight=2, held_out=0.2),
            SourceConfig(
                path=str(tmp_path / "code.jsonl.gz"),
                weight=1,
                filters=FilterConfig(min_characters=6),
                name="programs",
            ),
            SourceConfig(path=str(tmp_path / "maths"), weight=1, held_out=0.3),
        ),
        deduplicate=True,
        sequence_length=LENGTH,
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_prepared_corpus_tells_its_sources_apart(
    embedded_ray: None, base: Path, tmp_path: Path, several: CorpusConfig
) -> None:
    result = prepare_corpus(several, base, tmp_path / "out")
    sources = list_sources(result.output)
    assert [(s.name, s.weight, s.share) for s in sources] == [
        ("web", 2, 0.5),
        ("programs", 1, 0.25),
        ("maths", 1, 0.25),
    ]
    web = [json.loads(line)["text"] for line in (tmp_path / "web.jsonl").read_text().splitlines()]
    with gzip.open(tmp_path / "code.jsonl.gz", "rt") as file:
        lines = file.read().splitlines()
    code = [json.loads(line)["text"] for line in lines if line != "{"]
    maths = [f"theorem {i} of {i % 9}" for i in range(60)]
    seen: set[str] = set()
    for source, texts in zip(sources, (web, code, maths), strict=True):
        kept = [text for text in texts if source.name != "programs" or len(text) >= 6]
        unique = []
        for text in kept:
            if text not in seen:
                seen.add(text)
                unique.append(text)
        training, held_out = texts_of(source.unit_files), texts_of(source.held_out_files)
        assert sorted(training + held_out) == sorted(unique)
        assert training == [text for text in unique if text not in held_out]
        assert bool(held_out) == (source.name != "programs")
        assert (source.documents, source.held_out_documents) == (len(training), len(held_out))
        assert source.filtered == len(texts) - len(kept)
        assert source.duplicates == len(kept) - len(unique)
        assert source.tokens == sum(len(tokens_of(file)) for file in source.unit_files)
        rows = [pq.read_metadata(file).num_rows for file in source.unit_files]
        assert source.sequences == sum(rows)
        rows = [pq.read_metadata(file).num_rows for file in source.held_out_files]
        assert source.held_out_sequences == sum(rows)
    assert [s.bad_rows for s in sources] == [0, 1, 0]
    [bad] = (result.output / QUARANTINE_FILE).read_text().splitlines()
    assert json.loads(bad)["place"] == f"{tmp_path}/code.jsonl.gz:18"
    files = [file for source in sources for file in source.unit_files]
    assert files == sorted(result.output.glob("unit-*.parquet"))
    details = result.manifest.details
    for count in ("documents", "sequences", "tokens", "duplicates", "held_out_sequences"):
        assert details[count] == sum(getattr(source, count) for source in sources)

    # one process, one unit at a time, in another order
    prepare_here(several, tmp_path / "alone", order=random.Random(2))
    for file in result.output.glob("*.parquet"):
        assert file.read_bytes() == (tmp_path / "alone" / file.name).read_bytes()


@pytest.mark.timeout(300)
def test_whatever_makes_another_corpus_is_seen(
    embedded_ray: None, base: Path, tmp_path: Path
) -> None:
    path = tiny.write_jsonl(tmp_path / "data.jsonl", tiny.texts(20))
    config = CorpusConfig(sources=(SourceConfig(path=str(path)),), sequence_length=LENGTH)
    prepare_corpus(config, base, tmp_path / "out")
    assert prepare_corpus(config, base, tmp_path / "out").skipped

    def changed(**source: object) -> CorpusConfig:
        return config.model_copy(update={"sources": (config.sources[0].model_copy(update=source),)})

    variants = [
        changed(weight=1.0),
        changed(name="other"),
        changed(held_out=0.5),
        changed(filters=FilterConfig(min_characters=1)),
        changed(filters=FilterConfig(drop="x")),
        config.model_copy(update={"deduplicate": True}),
        config.model_copy(update={"seed": 1}),
        config.model_copy(update={"sources": config.sources * 2}),
    ]
    for variant in variants:
        with pytest.raises(LoramError, match="must be a new or empty directory"):
            prepare_corpus(variant, base, tmp_path / "out")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"quick", b"quiet", 1))
    with pytest.raises(LoramError, match="must be a new or empty directory"):
        prepare_corpus(config, base, tmp_path / "out")


@pytest.mark.timeout(300)
def test_a_source_of_which_nothing_is_left_is_refused_by_name(
    embedded_ray: None, base: Path, tmp_path: Path
) -> None:
    good = SourceConfig(path=str(tiny.write_jsonl(tmp_path / "good.jsonl", tiny.texts(20))))
    copy = SourceConfig(path=good.path, name="copy")
    strict = SourceConfig(path=good.path, name="strict", filters=FilterConfig(keep="cat"))
    for source, deduplicate, counts in (
        (strict, False, "20 filtered, 0 duplicates"),
        (copy, True, "0 filtered, 20 duplicates"),
    ):
        config = CorpusConfig(
            sources=(good, source), sequence_length=LENGTH, deduplicate=deduplicate
        )
        with pytest.raises(LoramError) as caught:
            prepare_corpus(config, base, tmp_path / "out")
        assert str(caught.value) == (
            f"align.corpus.sources.1 ({source.name}) must contain text, but none of its 20 rows is "
            f"left to train on ({counts}, 0 held out, 0 bad); add some or remove the source"
        )
        assert not (tmp_path / "out").exists()
    (tmp_path / "empty.jsonl").write_text("")
    empty = SourceConfig(path=str(tmp_path / "empty.jsonl"))
    with pytest.raises(
        LoramError, match=r"sources.1 \(empty\) must contain text, but every file is empty"
    ):
        prepare_corpus(CorpusConfig(sources=(good, empty)), base, tmp_path / "out")


@pytest.mark.timeout(300)
def test_a_cut_archive_stops_the_preparation_with_one_line(
    embedded_ray: None, base: Path, tmp_path: Path
) -> None:
    path = write_form(tmp_path, "jsonl.gz")
    path.write_bytes(path.read_bytes()[:-30])
    for deduplicate in (False, True):
        config = CorpusConfig(sources=(SourceConfig(path=str(path)),), deduplicate=deduplicate)
        with pytest.raises(
            LoramError, match=rf"^{path} is truncated or damaged past line"
        ) as caught:
            prepare_corpus(config, base, tmp_path / "out")
        assert len(str(caught.value).splitlines()) == 1
        assert not (tmp_path / "out").exists()


PREPARE = """
import sys
from pathlib import Path
from loram_ray.runtime.cluster import ray_session
from loram_ray.config import CorpusConfig, RayConfig
from loram_ray.corpus import read
from loram_ray.corpus.prepare import prepare_corpus
read.UNIT_BYTES = 2000
with ray_session(RayConfig(num_cpus=1)):
    config = CorpusConfig.model_validate_json(sys.argv[1])
    prepare_corpus(config, Path(sys.argv[2]), Path(sys.argv[3]))
"""


@pytest.mark.cluster
@pytest.mark.timeout(400)
@pytest.mark.slow
def test_a_killed_preparation_continues_to_the_same_corpus(
    embedded_ray: None, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "UNIT_BYTES", 2000)
    path = tiny.write_jsonl(tmp_path / "data.jsonl", tiny.texts(1200))
    source = SourceConfig(path=str(path), held_out=0.1)
    config = CorpusConfig(sources=(source,), sequence_length=LENGTH, deduplicate=True)
    whole = prepare_corpus(config, base, tmp_path / "whole")

    command = [sys.executable, "-c", PREPARE, config.model_dump_json(), str(base)]
    process = subprocess.Popen([*command, str(tmp_path / "out")], start_new_session=True)
    work = tmp_path / ".out.work"
    deadline = time.monotonic() + 300
    while len(list(work.glob("unit-*.json"))) < 5 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {path.name for path in work.glob("unit-*.json")}
    assert 5 <= len(done) < len(list_units(config.sources))
    assert not (tmp_path / "out").exists()
    name = min(done).replace(".json", ".parquet")
    inode = (work / name).stat().st_ino

    result = prepare_corpus(config, base, tmp_path / "out")
    assert result.manifest.files == whole.manifest.files
    assert (result.output / name).stat().st_ino == inode
    assert result.manifest.digest == whole.manifest.digest


def test_calibration_draws_the_same_from_a_compressed_file(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loram_ray.config import CalibrationConfig
    from loram_ray.pruning import text

    def drawn(form: str, samples: int) -> list[list[int]]:
        config = CalibrationConfig.model_validate(
            {
                "sources": [{"path": str(tmp_path / f"data.{form}")}],
                "sequence_length": LENGTH,
                "samples": samples,
            }
        )
        found: list[list[int]] = text.calibration_sequences(config, base, seed=3).tolist()
        return found

    for form in ("jsonl", "jsonl.gz"):
        write_form(tmp_path, form)
    assert drawn("jsonl.gz", 20) == drawn("jsonl", 20)
    whole = drawn("jsonl", 10_000)
    monkeypatch.setattr(text, "WINDOW_CHARACTERS", 200)  # of a larger piece: in parts, but all
    parts = drawn("jsonl.gz", 10_000)
    assert len(parts) == len(whole)
    assert parts != whole
    texts = tiny.tokenizer().decode([token for row in parts for token in row])
    assert sum(document in texts for document in TEXTS) >= len(TEXTS) - 1
