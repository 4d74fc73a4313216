"""Locate document boundaries in packed sequences and isolate documents by position ids.

The decoders in Transformers treat position ids that restart as packed sequences: they use
block-diagonal masks or variable-length attention kernels.
"""

from __future__ import annotations

import torch

from loram_ray.models.tokenizer import Frame


def document_positions(input_ids: torch.Tensor, frame: Frame) -> torch.Tensor:
    """Return position ids that restart at 0 with every document.

    Args:
        input_ids: Token ids, int64 ``[batch, seq]``.
        frame: Token ids that begin and end a document.

    Returns:
        Position ids, int64 ``[batch, seq]``.
    """
    begins = _begins(input_ids, frame)
    begins[:, 0] = True
    places = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    return places - places.where(begins, 0).cummax(dim=1).values


def openings(input_ids: torch.Tensor, frame: Frame) -> torch.Tensor:
    """Return a mask of the tokens that open a document, which are never predicted.

    Args:
        input_ids: Token ids, int64 ``[batch, seq]``.
        frame: Token ids that begin and end a document.

    Returns:
        Mask, bool ``[batch, seq]``.
    """
    begins, length = _begins(input_ids, frame), input_ids.shape[1]
    found = torch.zeros_like(begins)
    for place in range(min(len(frame.opening), length)):
        found[:, place:] |= begins[:, : length - place]
    return found


def _begins(input_ids: torch.Tensor, frame: Frame) -> torch.Tensor:
    """Return a mask of opening sequences at the front or after the end of a document.

    An opening truncated by the end of a sequence counts too.
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
    """If one token both opens and ends documents, mark those in a run that open one.

    At the front of a sequence the first token opens a document; elsewhere it ends one.

    Args:
        ends: Mask of that token, bool ``[batch, seq]``.
    """
    first = ends.clone()
    first[:, 1:] &= ~ends[:, :-1]
    places = torch.arange(ends.shape[1], device=ends.device).expand_as(ends)
    start = places.where(first, 0).cummax(dim=1).values
    return (places - start + (start > 0)) % 2 == 0
