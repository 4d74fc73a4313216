"""Calibration text: a seeded sample of documents, tokenised and cut into equal sequences."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from loram_ray.config import CalibrationConfig
from loram_ray.corpus.pack import pack, tokenise
from loram_ray.corpus.read import Unit, documents, list_units
from loram_ray.errors import LoramError
from loram_ray.models.tokenizer import frame_of, load_tokenizer
from loram_ray.runtime.progress import say

KEY = "prune.calibration"
WINDOW_CHARACTERS = 2**24


def calibration_sequences(config: CalibrationConfig, base: Path, seed: int) -> torch.Tensor:
    """Draw the calibration set, int64 ``[samples, sequence_length]``.

    The pieces of the sources (8 MB of a file, or a whole compressed file) are visited in a seeded
    order. Each contributes its share of the sequences from its documents in a seeded order (within
    16 MB of text in larger pieces). No sequence is padded. If there is too little text, the set has
    fewer samples than configured, and a message says so.

    Raises:
        LoramError: If there is no file, or too little text for one sequence.
    """
    tokenizer = load_tokenizer(base)
    frame = frame_of(tokenizer)
    length, wanted = config.sequence_length, config.samples
    units = list_units(config.sources, f"{KEY}.sources")
    random.Random(seed).shuffle(units)
    found: list[torch.Tensor] = []
    left_over: list[list[int]] = []
    for number, unit in enumerate(units):
        share = -(-(wanted - sum(map(len, found))) // (len(units) - number))
        if share <= 0:
            break
        drawn = _enough(_tokenised(tokenizer, unit, seed), share * length)
        sequences, lengths = pack(drawn, length, frame.end, frame.opening)
        whole = min(int((lengths == length).sum()), share)
        found.append(torch.from_numpy(sequences[:whole].astype("int64")))
        if whole < share and whole < len(sequences):
            left_over.append(sequences[whole, : lengths[whole]].tolist())
    sequences, lengths = pack(left_over, length, frame.end, frame.opening)
    found.append(torch.from_numpy(sequences[lengths == length].astype("int64")))
    samples = torch.cat([*found, torch.empty(0, length, dtype=torch.int64)])[:wanted]
    if not len(samples):
        raise LoramError(
            f"{KEY}.sources must contain at least one sequence of {length} tokens, got "
            f"{sum(map(len, left_over))} tokens; add text or lower {KEY}.sequence_length"
        )
    if len(samples) < wanted:
        say(
            "prune",
            f"{KEY}.sources contain {len(samples)} of {wanted} samples; continuing with these",
        )
    return samples


def _tokenised(tokenizer: Any, unit: Unit, seed: int) -> Iterator[list[int]]:
    """Yield each document's token ids in a seeded order, skipping unreadable rows."""
    draw = random.Random((seed << 20) + unit.index)
    for texts in _windows(document for document in documents(unit) if isinstance(document, str)):
        draw.shuffle(texts)
        yield from tokenise(tokenizer, texts)


def _enough(documents: Iterable[list[int]], tokens: int) -> Iterator[list[int]]:
    """Yield documents until they hold ``tokens`` tokens."""
    for ids in documents:
        yield ids
        tokens -= len(ids)
        if tokens <= 0:
            return


def _windows(texts: Iterable[str]) -> Iterator[list[str]]:
    window: list[str] = []
    characters = 0
    for text in texts:
        window.append(text)
        characters += len(text)
        if characters >= WINDOW_CHARACTERS:
            yield window
            window, characters = [], 0
    if window:
        yield window
