"""Calibration text: a seeded draw of documents, tokenised and cut into equal sequences."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from loram_ray.config import CalibrationConfig
from loram_ray.corpus.pack import end_of_text, pack, tokenise
from loram_ray.corpus.read import Unit, documents, list_units
from loram_ray.errors import LoramError
from loram_ray.progress import say
from loram_ray.tokenizer import load_tokenizer

KEY = "prune.calibration"
_WINDOW_CHARACTERS = 2**24


def calibration_sequences(config: CalibrationConfig, base: Path, seed: int) -> torch.Tensor:
    """Draw the calibration set, int64 ``[samples, sequence_length]``.

    The pieces of the sources (8 MB of a file, all of a compressed one) are visited in a seeded
    order, each gives its share of the sequences from its documents in a seeded order (within 16 MB
    of text where a piece is larger), and no sequence is padded. Where the text
    is short there are fewer samples than asked for, and a message.

    Raises:
        LoramError: no file, or not text enough for one sequence.
    """
    tokenizer = load_tokenizer(base)
    length, wanted = config.sequence_length, config.samples
    units = list_units(config.sources, f"{KEY}.sources")
    random.Random(seed).shuffle(units)
    found: list[torch.Tensor] = []
    left_over: list[list[int]] = []
    for number, unit in enumerate(units):
        share = -(-(wanted - sum(map(len, found))) // (len(units) - number))
        if share <= 0:
            break
        tokens = islice(_tokens(tokenizer, unit, seed), share * length)
        sequences, lengths = pack([list(tokens)], length, end_of_text(tokenizer))
        whole = int((lengths == length).sum())
        found.append(torch.from_numpy(sequences[:whole].astype("int64")))
        left_over.append(sequences[whole:].reshape(-1)[: int(lengths[whole:].sum())].tolist())
    found.append(_join(left_over, length))
    drawn = torch.cat([*found, torch.empty(0, length, dtype=torch.int64)])[:wanted]
    if not len(drawn):
        raise LoramError(
            f"{KEY}.sources must hold at least one sequence of {length} tokens, they hold "
            f"{sum(map(len, left_over))}; give more text or lower {KEY}.sequence_length"
        )
    if len(drawn) < wanted:
        say("prune", f"{KEY}.sources hold {len(drawn)} samples of {wanted}; going on with those")
    return drawn


def _tokens(tokenizer: Any, unit: Unit, seed: int) -> Iterator[int]:
    """Token ids of a unit's documents in a seeded order; unreadable rows are passed over."""
    draw = random.Random((seed << 20) + unit.index)
    for texts in _windows(document for document in documents(unit) if isinstance(document, str)):
        draw.shuffle(texts)
        for ids in tokenise(tokenizer, texts):
            yield from ids


def _windows(texts: Iterable[str]) -> Iterator[list[str]]:
    window: list[str] = []
    characters = 0
    for text in texts:
        window.append(text)
        characters += len(text)
        if characters >= _WINDOW_CHARACTERS:
            yield window
            window, characters = [], 0
    if window:
        yield window


def _join(parts: Sequence[list[int]], length: int) -> torch.Tensor:
    """Whole sequences out of what single units had left over, int64 ``[sequences, length]``."""
    tokens = torch.tensor([token for part in parts for token in part], dtype=torch.int64)
    whole = len(tokens) // length
    return tokens[: whole * length].view(whole, length)
