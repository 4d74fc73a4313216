"""Log-likelihoods of choices after contexts, and of answers; pure functions of a model.

The choices of one context are concatenated in one row. Each choice attends to the context and to
itself only, and has the positions that it would have directly after the context. This tree needs no
copy of the context for each choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from loram_ray.corpus.batches import Row, padded
from loram_ray.evaluation.engine import Engine
from loram_ray.losses import CHUNK, labelled, logits_of

_CONTEXT, _FILLED = 0, -1


@dataclass(frozen=True)
class Branches:
    """A context and the choices that may follow it.

    Attributes:
        context: Token ids of the context, at least one.
        choices: Token ids of each choice, at least one.
    """

    context: list[int]
    choices: tuple[list[int], ...]

    @property
    def longest(self) -> int:
        """Number of tokens of the context with its longest choice."""
        return len(self.context) + max(map(len, self.choices))

    @property
    def tokens(self) -> int:
        """Number of tokens of the row that holds the context and all choices."""
        return len(self.context) + sum(len(choice) - 1 for choice in self.choices)


def nlls_of_branches(
    engine: Engine, items: Sequence[Branches], begin: int = 0
) -> list[list[tuple[float, bool]]]:
    """Return the negative log-likelihood of each choice after its context, in nats.

    Args:
        engine: Model to score with.
        items: Contexts and choices, computed in one forward pass. If the sliding window is shorter
            than an item, each choice has a forward pass of its own.
        begin: Number of tokens that all contexts begin with, less than the length of any context.
            These are computed once and cached between calls.

    Returns:
        For each choice of each item, the sum over its tokens and whether each token is the
        likeliest at its place.
    """
    window = engine.window()
    if window is not None and max(item.longest for item in items) > window:
        alone = [Branches(item.context, (choice,)) for item in items for choice in item.choices]
        found = iter(nlls[0] for one in alone for nlls in _in_one(engine, [one], 0))
        return [[next(found) for _ in item.choices] for item in items]
    return _in_one(engine, items, begin)


def _in_one(
    engine: Engine, items: Sequence[Branches], begin: int
) -> list[list[tuple[float, bool]]]:
    width = max(item.tokens for item in items) - begin
    ids = torch.full((len(items), width), engine.padding)
    positions = torch.zeros_like(ids)
    groups = torch.full_like(ids, _FILLED)  # 0 for the context, then one number for each choice
    places: list[tuple[int, int]] = []  # states that predict the targets
    targets: list[int] = []
    owners: list[int] = []
    choices = 0
    for row, item in enumerate(items):
        end = len(item.context) - begin
        last = end - 1
        ids[row, :end] = torch.tensor(item.context[begin:])
        positions[row, :end] = torch.arange(begin, len(item.context))
        groups[row, :end] = _CONTEXT
        for group, choice in enumerate(item.choices, start=1):
            seen = len(choice) - 1
            ids[row, end : end + seen] = torch.tensor(choice[:-1], dtype=torch.int64)
            positions[row, end : end + seen] = len(item.context) + torch.arange(seen)
            groups[row, end : end + seen] = group
            places += [(row, last), *((row, end + step) for step in range(seen))]
            targets += choice
            owners += [choices] * len(choice)
            choices += 1
            end += seen
    ids, positions = ids.to(engine.device), positions.to(engine.device)
    model = engine.model
    if begin or any(len(item.choices) > 1 for item in items):
        mask = _tree(groups, begin, model.dtype)
        cache = engine.begun(items[0].context[:begin], len(items)) if begin else None
        hidden = model.get_decoder()(
            input_ids=ids,
            attention_mask=mask.to(engine.device),
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )[0]
    else:
        there = (groups != _FILLED).long().to(engine.device)
        hidden = model.get_decoder()(
            input_ids=ids, attention_mask=there, position_ids=positions, use_cache=False
        )[0]
    rows, columns = torch.tensor(places, device=engine.device).T
    nlls, likeliest = nlls_of_states(
        model, hidden[rows, columns], torch.tensor(targets, device=engine.device)
    )
    owner = torch.tensor(owners, device=engine.device)
    sums = torch.zeros(choices, dtype=torch.float64, device=engine.device)
    sums.index_add_(0, owner, nlls.double())
    missed = torch.zeros(choices, dtype=torch.int64, device=engine.device)
    missed.index_add_(0, owner, (~likeliest).long())
    found = iter(zip(sums.tolist(), (missed == 0).tolist(), strict=True))
    return [[next(found) for _ in item.choices] for item in items]


def _tree(groups: torch.Tensor, begin: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the additive attention mask of a tree, ``[rows, 1, seq, begin + seq]``.

    Args:
        groups: Group of each token, int64 ``[rows, seq]``: `_CONTEXT`, a choice's number or
            `_FILLED`.
        begin: Number of cached tokens in front, which all tokens see.
        dtype: Dtype of the mask.
    """
    rows, width = groups.shape
    earlier = torch.ones(width, width, dtype=torch.bool).tril()
    own = groups[:, :, None] == groups[:, None, :]
    sees = earlier & (own | (groups == _CONTEXT)[:, None, :])
    sees = torch.cat([torch.ones(rows, width, begin, dtype=torch.bool), sees], dim=2)
    hidden = torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)
    return hidden[:, None]


def nlls_of_rows(engine: Engine, rows: Sequence[Row]) -> list[tuple[float, int]]:
    """Return the negative log-likelihood of each row's labels in nats, and the number of labels.

    Args:
        engine: Model to score with.
        rows: ``input_ids`` and ``labels`` of each row, computed in one forward pass.
    """
    batch = {
        name: tensor.to(engine.device) for name, tensor in padded(rows, engine.padding).items()
    }
    wanted = labelled(batch["labels"])
    hidden = engine.model.get_decoder()(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    )[0]
    nlls, _ = nlls_of_states(engine.model, hidden[:, :-1][wanted], batch["labels"][:, 1:][wanted])
    sums = torch.zeros(len(rows), dtype=torch.float64, device=engine.device)
    sums.index_add_(0, wanted.nonzero()[:, 0], nlls.double())
    return list(zip(sums.tolist(), wanted.sum(dim=1).tolist(), strict=True))


def nlls_of_states(
    model: nn.Module, states: torch.Tensor, targets: torch.Tensor, chunk: int = CHUNK
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the negative log-likelihood of a token after each state, and whether it is likeliest.

    Args:
        model: Causal LM of transformers.
        states: Hidden states after the final norm, ``[n, hidden]``.
        targets: Token ids, int64 ``[n]``.
        chunk: Number of states whose logits are in memory at a time.

    Returns:
        The negative log-likelihoods in nats, float32 ``[n]``, and whether each target is the
        likeliest token, bool ``[n]``.
    """
    nlls = torch.empty(len(states), device=states.device)
    likeliest = torch.empty(len(states), dtype=torch.bool, device=states.device)
    for start in range(0, len(states), chunk):
        piece = slice(start, start + chunk)
        logits = logits_of(model, states[piece])
        nlls[piece] = functional.cross_entropy(logits, targets[piece], reduction="none")
        likeliest[piece] = logits.argmax(dim=-1) == targets[piece]
    return nlls, likeliest
