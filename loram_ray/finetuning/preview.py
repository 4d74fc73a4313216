"""Preview of a training's first examples, token by token, before anything is loaded or trained."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from loram_ray.config import TrainConfig
from loram_ray.corpus.examples import Example, require_examples, tokenised_rows
from loram_ray.corpus.read import BadRow
from loram_ray.losses import IGNORED
from loram_ray.models.tokenizer import load_tokenizer

_BETWEEN = "·"
_WRITTEN_OUT = {ord("\\"): "\\\\", ord("\n"): "\\n", ord("\t"): "\\t", ord("\r"): "\\r"}


@dataclass(frozen=True)
class Preview:
    """Tokenised training example.

    Attributes:
        example: Token ids, and which of them carry loss.
        pieces: Text of each token.
    """

    example: Example
    pieces: list[str]

    def as_json(self) -> dict[str, Any]:
        """Return the example's location, and each token's id, text and whether it carries loss."""
        carries = self._carries_loss()
        return {
            "place": self.example.place,
            "tokens": [
                {"id": token, "text": piece, "loss": loss}
                for token, piece, loss in zip(
                    self.example.input_ids, self.pieces, carries, strict=True
                )
            ],
        }

    def as_text(self) -> Text:
        """Return runs of tokens with and without loss, one labelled line for each run.

        Tokens are separated by dots, and line ends are shown escaped.
        """
        count, learnt = len(self.pieces), sum(self._carries_loss())
        text = Text(f"{self.example.place}: {count} tokens, {learnt} with loss\n", style="bold")
        for loss, run in itertools.groupby(
            zip(self._carries_loss(), self.pieces, strict=True), key=lambda pair: pair[0]
        ):
            shown = _BETWEEN.join(_visible(piece) for _, piece in run)
            text.append("loss  " if loss else "      ", style="green" if loss else "dim")
            text.append(f"{shown}\n", style="green" if loss else "dim")
        return text

    def _carries_loss(self) -> list[bool]:
        return [label != IGNORED for label in self.example.labels]


def preview(config: TrainConfig, count: int) -> Iterator[Preview | BadRow]:
    """Tokenise the first examples of a training without reading the model's weights.

    Args:
        config: Configuration of the train stage.
        count: Number of examples.

    Yields:
        The examples, and each unusable row before the last of them.

    Raises:
        LoramError: There is no tokenizer, no chat template or no usable example.
    """
    tokenizer = load_tokenizer(config.model, config.chat_template, "train.chat_template")
    shown = 0
    for found in tokenised_rows(tokenizer, config.data, config.max_length, "train.data"):
        if isinstance(found, BadRow):
            yield found
            continue
        for example in found[1]:
            if shown == count:
                return
            shown += 1
            yield Preview(example, [_text_of(tokenizer, token) for token in example.input_ids])
    require_examples(shown, config.data, "train.data")


def _text_of(tokenizer: Any, token: int) -> str:
    """Return a token's text, with the space that SentencePiece drops when decoding it alone."""
    piece = str(tokenizer.convert_ids_to_tokens(token))
    return piece.replace("▁", " ") if piece.startswith("▁") else str(tokenizer.decode([token]))


def _visible(piece: str) -> str:
    return piece.translate(_WRITTEN_OUT)
