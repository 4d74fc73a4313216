"""A model to score items with, which computes the common beginning of prompts once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

_WORTH_KEEPING = 16
"""Minimum length in tokens of a common prefix whose keys and values are cached."""


class Engine:
    """A causal LM of transformers with its tokenizer.

    Args:
        model: Model in evaluation mode, with its adapter.
        tokenizer: Tokenizer of the model.

    Attributes:
        model: The model.
        tokenizer: The tokenizer.
        device: Device of the model's inputs.
        padding: Token id for padding.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.device = next(model.parameters()).device
        self.padding: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self._begin: list[int] = []
        self._kept: DynamicCache | None = None

    def begun(self, begin: Sequence[int], rows: int) -> DynamicCache:
        """Return the cached keys and values of a beginning, as a copy that can be extended.

        The latest beginning stays cached. If all prompts of a benchmark begin with the same solved
        examples, their forward pass is computed only once.

        Args:
            begin: Token ids of the beginning.
            rows: Number of rows to repeat the cache for.
        """
        if self._kept is None or self._begin != list(begin):
            from transformers import DynamicCache

            kept = DynamicCache(config=self.model.config)
            ids = torch.tensor([list(begin)], device=self.device)
            self.model.get_decoder()(input_ids=ids, past_key_values=kept, use_cache=True)
            self._begin, self._kept = list(begin), kept
        found = copy.deepcopy(self._kept)
        found.batch_repeat_interleave(rows)
        return found

    def window(self) -> int | None:
        """Return the sliding window in tokens, or None if all layers see all tokens."""
        config = self.model.config
        if not getattr(config, "use_sliding_window", True):
            return None
        window: int | None = getattr(config, "sliding_window", None)
        return window


def common_beginning(rows: Sequence[list[int]]) -> int:
    """Return how many tokens all rows begin with, excluding the last token of each row.

    The count is zero for a single row, or if the common beginning is too short to cache.
    """
    if len(rows) < 2:
        return 0
    least, most = min(rows), max(rows)  # in sorted order, all other rows are between these
    count = min(map(len, rows)) - 1
    for place in range(count):
        if least[place] != most[place]:
            count = place
            break
    return count if count >= _WORTH_KEEPING else 0
