"""The examples that a training learns from, and those that it is judged by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loram_ray.config import TrainConfig
from loram_ray.corpus.examples import ExampleTable, is_held_out, load_examples
from loram_ray.errors import LoramError


def tables(
    config: TrainConfig, tokenizer: Any, folder: Path
) -> tuple[ExampleTable, ExampleTable | None]:
    """Tokenise the rows of a training.

    Args:
        config: the stage's configuration.
        tokenizer: of the model.
        folder: gets a file of each table.

    Returns:
        Examples to learn, and held-out ones where the configuration has some.

    Raises:
        LoramError: no usable example on either side, or too many rows that are not usable.
    """
    length, share = config.max_length, config.max_bad_share
    rows = load_examples(tokenizer, config.data, length, share, "train.data")
    learnt, held_out = folder / "examples.arrow", folder / "held_out.arrow"
    if config.eval_data is not None:
        judged = load_examples(tokenizer, config.eval_data, length, share, "train.eval_data")
        return (
            ExampleTable.write((example for _, example in rows), learnt),
            ExampleTable.write((example for _, example in judged), held_out),
        )
    if not config.eval_share:
        return ExampleTable.write((example for _, example in rows), learnt), None
    found = ExampleTable.split(
        ((is_held_out(row, config.eval_share, config.seed), example) for row, example in rows),
        learnt,
        held_out,
    )
    counts = [len(table) for table in found]
    if not all(counts):
        raise LoramError(
            f"train.eval_share must leave examples on both sides, {config.eval_share} makes "
            f"{counts[0]} to learn and {counts[1]} held out; change it or give train.eval_data"
        )
    return found
