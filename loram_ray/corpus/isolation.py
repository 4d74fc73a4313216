"""Where documents begin in packed sequences, and positions with which they do not see each other.

transformers' decoders take position ids that begin anew as a sign of packed sequences: their masks
become block-diagonal, or their kernels work on sequences of varying length.
"""

from __future__ import annotations

import torch

from loram_ray.models.tokenizer import Frame


def document_positions(input_ids: torch.Tensor, frame: Frame) -> torch.Tensor:
    """Positions that begin at 0 with every document.

    Args:
        input_ids: int64 ``[batch, seq]``.
        frame: how documents begin and end.

    Returns:
        Int64 ``[batch, seq]``.
    """
    begins = _begins(input_ids, frame)
    begins[:, 0] = True
    places = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    return places - places.where(begins, 0).cummax(dim=1).values


def openings(input_ids: torch.Tensor, frame: Frame) -> torch.Tensor:
    """Mask of the tokens that open a document, bool ``[batch, seq]``: they are never predicted.

    Args:
        input_ids: int64 ``[batch, seq]``.
        frame: how documents begin and end.
    """
    begins, length = _begins(input_ids, frame), input_ids.shape[1]
    found = torch.zeros_like(begins)
    for place in range(min(len(frame.opening), length)):
        found[:, place:] |= begins[:, : length - place]
    return found


def _begins(input_ids: torch.Tensor, frame: Frame) -> torch.Tensor:
    """Mask of where the opening stands at the front or behind a document's end.

    An opening that a sequence's end cuts counts too.
    """
    begins = torch.ones_like(input_ids, dtype=torch.bool)
    begins[:, 1:] = input_ids[:, :-1] == frame.end
    length = input_ids.shape[1]
    for place, token in enumerate(frame.opening[:length]):
        begins[:, : length - place] &= input_ids[:, place:] == token
    if frame.opening == (frame.end,):
        begins &= _every_second(input_ids == frame.end)
    return begins


def _every_second(ends: torch.Tensor) -> torch.Tensor:
    """Where one token both opens and ends documents: which of a run of them open one.

    At the front of a sequence the first opens; elsewhere the first ends a document.

    Args:
        ends: where that token stands, bool ``[batch, seq]``.
    """
    first = ends.clone()
    first[:, 1:] &= ~ends[:, :-1]
    places = torch.arange(ends.shape[1], device=ends.device).expand_as(ends)
    start = places.where(first, 0).cummax(dim=1).values
    return (places - start + (start > 0)) % 2 == 0
