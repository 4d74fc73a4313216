"""A model that items are scored with, and what their tokens begin with in common, computed once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

_WORTH_KEEPING = 16
"""Tokens in common from which on keys and values of them are kept."""


class Engine:
    """A causal LM of transformers with its tokenizer.

    Args:
        model: in evaluation mode, with its adapter.
        tokenizer: of the model.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        device: where its inputs go.
        padding: id to fill with.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.device = next(model.parameters()).device
        self.padding: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self._begin: list[int] = []
        self._kept: DynamicCache | None = None

    def begun(self, begin: Sequence[int], rows: int) -> DynamicCache:
        """Keys and values of what rows begin with, a copy that may be added to.

        Those of the newest beginning are kept, so that the items of a benchmark, with the same
        solved examples in front of all of them, cost a forward pass over these only once.

        Args:
            begin: token ids.
            rows: that the copy is for.
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
        """Tokens that a layer sees back at most, None where all layers see all."""
        config = self.model.config
        if not getattr(config, "use_sliding_window", True):
            return None
        window: int | None = getattr(config, "sliding_window", None)
        return window


def common_beginning(rows: Sequence[list[int]]) -> int:
    """How many tokens all of several rows begin with, of each at most all but the last.

    Zero where it is not worth the while: of few tokens, or of one row.
    """
    if len(rows) < 2:
        return 0
    least, most = min(rows), max(rows)  # in their order all others are between these
    count = min(map(len, rows)) - 1
    for place in range(count):
        if least[place] != most[place]:
            count = place
            break
    return count if count >= _WORTH_KEEPING else 0
