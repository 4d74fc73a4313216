"""Training examples and held-out examples."""

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
        config: Configuration of the train stage.
        tokenizer: Tokenizer of the model.
        folder: Directory to write one file per table to.

    Returns:
        The training examples, and the held-out examples or None if none are configured.

    Raises:
        LoramError: A table has no usable example, or too many unusable rows.
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
            "train.eval_share must leave examples for both training and evaluation, but "
            f"{config.eval_share} leaves {counts[0]} and {counts[1]}; change it or set "
            "train.eval_data"
        )
    return found
