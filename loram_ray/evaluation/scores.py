"""Perplexity of answers or text, and exact match of greedy answers; pure functions of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loram_ray.corpus.batches import longest_first, padded
from loram_ray.corpus.conversations import Conversation
from loram_ray.corpus.examples import Example, end_of_answer, prompt_ids
from loram_ray.losses import IGNORED, summed_loss


@dataclass(frozen=True)
class Likelihood:
    """Summed negative log-likelihood of some tokens.

    Attributes:
        nll: in nats.
        tokens: how many.
    """

    nll: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """``exp(nll / tokens)``; infinite where it overflows."""
        mean = self.nll / self.tokens
        return math.exp(mean) if mean < 700 else math.inf

    def __add__(self, other: Likelihood) -> Likelihood:
        return Likelihood(self.nll + other.nll, self.tokens + other.tokens)


@torch.inference_mode()
def answer_likelihood(
    model: nn.Module,
    examples: Sequence[Example],
    padding: int,
    batch_size: int,
    advance: Callable[[int], None],
) -> Likelihood:
    """Likelihood of the answers of tokenised conversations, batched by length.

    Args:
        model: a causal LM of transformers.
        examples: prompts and answers.
        padding: token id to pad with.
        batch_size: examples in one forward.
        advance: told how many examples were done.
    """
    total = Likelihood(0.0, 0)
    for batch in longest_first(examples, lambda e: len(e.input_ids), batch_size):
        rows = [{"input_ids": e.input_ids, "labels": e.labels} for e in batch]
        total += _likelihood(model, padded(rows, padding))
        advance(len(batch))
    return total


@torch.inference_mode()
def text_likelihood(
    model: nn.Module,
    sequences: torch.Tensor,
    lengths: torch.Tensor,
    batch_size: int,
    advance: Callable[[int], None],
) -> Likelihood:
    """Likelihood of packed text; the first token of each sequence is not predicted.

    Args:
        model: a causal LM of transformers.
        sequences: int64 ``[sequences, seq]``.
        lengths: true length of each, int64 ``[sequences]``.
        batch_size: sequences in one forward.
        advance: told how many sequences were done.
    """
    total = Likelihood(0.0, 0)
    padding = torch.arange(sequences.shape[1]) >= lengths[:, None]
    for ids, filled in zip(sequences.split(batch_size), padding.split(batch_size), strict=True):
        rows = {
            "input_ids": ids,
            "attention_mask": (~filled).long(),
            "labels": ids.masked_fill(filled, IGNORED),
        }
        total += _likelihood(model, rows)
        advance(len(ids))
    return total


@torch.inference_mode()
def exact_matches(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    batch_size: int,
    max_new_tokens: int,
    advance: Callable[[int], None],
) -> int:
    """How many greedily generated answers equal the reference, surrounding space ignored.

    Args:
        model: a causal LM of transformers.
        tokenizer: its tokenizer, with a chat template.
        conversations: prompts and reference answers.
        batch_size: answers generated at a time.
        max_new_tokens: longest answer.
        advance: told how many conversations were done.
    """
    device = next(model.parameters()).device
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    prompts = [(prompt_ids(tokenizer, c), c.answer) for c in conversations]
    stops = _stop_tokens(model, tokenizer)
    matches = 0
    for batch in longest_first(prompts, lambda p: len(p[0]), batch_size):
        longest = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([[padding] * (longest - len(p)) + p for p, _ in batch], device=device)
        mask = torch.tensor(
            [[0] * (longest - len(p)) + [1] * len(p) for p, _ in batch], device=device
        )
        generated = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=padding,
            eos_token_id=stops,
        )
        texts = tokenizer.batch_decode(generated[:, longest:], skip_special_tokens=True)
        matches += sum(
            text.strip() == answer.strip() for text, (_, answer) in zip(texts, batch, strict=True)
        )
        advance(len(batch))
    return matches


def _stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens at which an answer ends: the model's, the tokenizer's, and the chat template's."""
    of_model = model.generation_config.eos_token_id
    found = [*(of_model if isinstance(of_model, list) else [of_model])]
    found += [tokenizer.eos_token_id, end_of_answer(tokenizer)]
    return sorted({token for token in found if token is not None})


def _likelihood(model: nn.Module, rows: dict[str, torch.Tensor]) -> Likelihood:
    device = next(model.parameters()).device
    ids, mask, labels = (rows[k].to(device) for k in ("input_ids", "attention_mask", "labels"))
    total, count = summed_loss(model, ids, mask, labels)
    return Likelihood(float(total), int(count))
