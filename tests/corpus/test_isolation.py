"""Packed documents that do not see each other, against each document alone, in every family."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers import families
from loram_ray.alignment.batches import to_device
from loram_ray.corpus.isolation import document_positions
from loram_ray.losses import IGNORED
from loram_ray.models.tokenizer import Frame

CLOSING = 0
FRAME = Frame((), (CLOSING,))


def test_positions_begin_anew_after_every_closing_token() -> None:
    ids = torch.tensor([[5, 6, 0, 7, 0, 0, 8, 9], [0, 1, 2, 3, 4, 5, 6, 0]])
    assert document_positions(ids, FRAME).tolist() == [
        [0, 1, 2, 0, 1, 0, 0, 1],
        [0, 0, 1, 2, 3, 4, 5, 6],
    ]


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_packed_documents_are_what_each_is_alone(family: str) -> None:
    model = families.build(family).eval()
    generator = torch.Generator().manual_seed(0)
    documents = [
        torch.cat([torch.randint(1, 200, (n,), generator=generator), torch.tensor([CLOSING])])
        for n in (5, 11, 0, 17, 14, 1)
    ]
    packed = torch.stack(
        [torch.cat(documents[:4]), torch.cat([*documents[4:], *documents[:4]])[:37]]
    )
    with torch.inference_mode():
        positions = document_positions(packed, FRAME)
        found = model.get_decoder()(input_ids=packed, position_ids=positions, use_cache=False)[0]
        seen = model.get_decoder()(input_ids=packed, use_cache=False)[0]
        begin = 0
        for document in documents[:4]:
            alone = model.get_decoder()(input_ids=document[None], use_cache=False)[0][0]
            end = begin + len(document)
            torch.testing.assert_close(found[0, begin:end], alone, atol=1e-4, rtol=1e-3)
            begin = end
    assert (found[0, 6:] - seen[0, 6:]).abs().max() > 1e-3  # it matters


def test_the_first_token_of_an_isolated_document_carries_no_label() -> None:
    batch = {
        "input_ids": np.array([[5, 6, 0, 7, 8, 0]], dtype=np.int32),
        "length": np.array([5], dtype=np.int32),
        "row_id": np.array([3]),
    }
    isolated = to_device(batch, torch.device("cpu"), FRAME, isolated=True)
    assert isolated.labels.tolist() == [[IGNORED, 6, 0, IGNORED, 8, IGNORED]]
    assert isolated.positions is not None
    together = to_device(batch, torch.device("cpu"), FRAME, isolated=False)
    assert together.labels.tolist() == [[5, 6, 0, 7, 8, IGNORED]]
    assert together.positions is None
