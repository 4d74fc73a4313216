"""Tokenising and packing text against Hugging Face datasets, and memory as one archive grows.

    PYTHONPATH=.venv/lm-eval python tests/benchmarks/corpus.py FOLDER

The peer, datasets, comes with lm-eval. FOLDER gets SmolLM2's tokenizer and text. ``--megabytes``,
``--rounds`` and ``--archives`` make it smaller.

Both read the same JSON lines with two processes, tokenise with the same tokenizer, close each
document with the end-of-text token, cut sequences of 1,024 tokens and write them. The peer does so
as Hugging Face's examples do: ``map`` to tokenise, ``map`` to group, both batched. Starting Ray and
its workers, and loading the tokenizer, are not in the time; the peer's processes are forked. Ray's
workers have the priority that the peer's have.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import time
from itertools import chain, cycle
from pathlib import Path
from typing import Any

from measure import in_fresh_process, median, peak_memory

LENGTH, PROCESSES, ROUNDS, MEGABYTES, ARCHIVES = 1024, 2, 3, 64, (10, 100, 1000)
MB = 1e6


def write_inputs(folder: Path, megabytes: int, archives: list[int]) -> None:
    """Write the tokenizer, JSON lines, and archives of the given megabytes unpacked."""
    from loram_ray import demo

    if not (folder / "base").exists():
        demo.write_base(folder / "base")
    documents = list(demo.prose())
    with open(folder / "text.jsonl", "w") as file:
        _fill(file, documents, megabytes)
    for number in range(PROCESSES):  # a file for each process, which loads the tokenizer with it
        with open(folder / f"warm-{number}.jsonl", "w") as file:
            _fill(file, documents, 1)
    for size in archives:
        with gzip.open(folder / f"{size}.jsonl.gz", "wt", compresslevel=1) as file:
            _fill(file, documents, size)


def _fill(file: Any, documents: list[str], megabytes: int) -> None:
    written = 0
    for number, text in enumerate(cycle(documents)):
        if written >= megabytes * MB:
            return
        written += file.write(json.dumps({"text": f"{number} {text}"}) + "\n")


def ours(folder: Path) -> dict[str, Any]:
    from loram_ray.config import CorpusConfig, RayConfig
    from loram_ray.corpus.prepare import prepare_corpus
    from loram_ray.runtime.cluster import ray_session

    def prepared(name: str) -> dict[str, Any]:
        source = {"path": str(folder / name)}
        config = CorpusConfig.model_validate({"sources": [source], "sequence_length": LENGTH})
        details = prepare_corpus(config, folder / "base", folder / "ours").manifest.details
        shutil.rmtree(folder / "ours")
        return details

    with ray_session(RayConfig(num_cpus=PROCESSES)):
        prepared("warm-*.jsonl")
        started = time.perf_counter()
        details = prepared("text.jsonl")
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "rows": details["sequences"], "tokens": details["tokens"]}


def peers(folder: Path) -> dict[str, Any]:
    """Hugging Face datasets; runs in an environment without loram_ray."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    closing = tokenizer.eos_token_id

    def tokenise(batch: dict[str, list[str]]) -> dict[str, Any]:
        encoded = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False)
        return {"input_ids": [[*ids, closing] for ids in encoded["input_ids"]]}

    def group(batch: dict[str, list[list[int]]]) -> dict[str, Any]:
        tokens = list(chain.from_iterable(batch["input_ids"]))
        starts = range(0, len(tokens), LENGTH)
        return {"input_ids": [tokens[start : start + LENGTH] for start in starts]}

    started = time.perf_counter()
    text = datasets.load_dataset(
        "json", data_files=str(folder / "text.jsonl"), split="train", cache_dir=str(folder / "peer")
    )
    tokens = text.map(tokenise, remove_columns=["text"], batched=True, num_proc=PROCESSES)
    rows = tokens.map(group, batched=True, num_proc=PROCESSES)
    seconds = time.perf_counter() - started
    count = sum(map(len, rows["input_ids"]))
    shutil.rmtree(folder / "peer")
    return {"seconds": seconds, "rows": len(rows), "tokens": count}


def memory(folder: Path, size: str) -> dict[str, Any]:
    """Peak memory of one process that compares and prepares one archive, which is one unit."""
    from loram_ray.config import TextSource
    from loram_ray.corpus.duplicates import duplicates_of, find_duplicates, write_hashes
    from loram_ray.corpus.prepare import prepare_unit
    from loram_ray.corpus.read import list_units
    from loram_ray.corpus.selection import Selection
    from loram_ray.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder / "base")
    work = folder / f"work-{size}"
    work.mkdir()
    before = peak_memory()
    [unit] = list_units([TextSource(path=str(folder / f"{size}.jsonl.gz"))])
    write_hashes(unit, work, Selection())
    find_duplicates(0, 1, work, 1)
    counts = prepare_unit(
        unit, work, LENGTH, tokenizer, Selection(held_out=0.01), duplicates_of(0, 1, work)
    )
    shutil.rmtree(work)
    return {"bytes": peak_memory(), "before": before, "tokens": counts.tokens}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=int, default=MEGABYTES)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--archives", type=int, nargs="*", default=ARCHIVES)
    parser.add_argument("--only", help="ours, peers, or the megabytes of an archive")
    options = parser.parse_args()
    folder = options.folder.resolve()
    if options.only in ("ours", "peers"):
        print(json.dumps({"ours": ours, "peers": peers}[options.only](folder)))
        return
    if options.only:
        print(json.dumps(memory(folder, options.only)))
        return
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAY_worker_niceness": "0"}
    write_inputs(folder, options.megabytes, options.archives)

    def measured(what: str) -> dict[str, Any]:
        return in_fresh_process(Path(__file__), str(folder), "--only", what)

    rounds = []
    for _ in range(options.rounds):  # in turns, for what else the machine does
        one = {"ours": measured("ours"), "peer": measured("peers")}
        rounds.append({**one, "ratio": _rate(one["ours"]) / _rate(one["peer"])})
    found = {
        "megabytes": options.megabytes,
        "rounds": rounds,
        "rows_per_s": {who: median([_rate(r[who]) for r in rounds]) for who in ("ours", "peer")},
        "ratio": median([r["ratio"] for r in rounds]),
        "memory": {str(size): measured(str(size)) for size in options.archives},
    }
    print(json.dumps(found))


def _rate(result: dict[str, Any]) -> float:
    """Full rows a second; the peer's have a short one at the end of each batch."""
    return float(result["tokens"] / LENGTH / result["seconds"])


if __name__ == "__main__":
    main()
