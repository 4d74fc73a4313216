"""Packed examples against padded ones."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from helpers import families, tiny
from helpers.training import (
    adapter,
    config,
    lines,
    losses,
    run_directly,
)
from loram_ray.corpus.batches import first_fit_decreasing, packed, padded
from loram_ray.losses import IGNORED, summed_loss


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Examples of very different lengths."""
    rows = [
        {"prompt": "say " + "la " * (i * 7 % 23), "completion": "so " * (1 + i * 5 % 11)}
        for i in range(40)
    ]
    return tiny.write_jsonl(tmp_path_factory.mktemp("uneven") / "data.jsonl", rows)


def random_rows(lengths: list[int], vocabulary: int = 200) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(len(lengths))
    rows = []
    for length in lengths:
        ids = torch.randint(1, vocabulary, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORED] * (length // 3) + ids[length // 3 :]})
    return rows


@pytest.mark.parametrize("in_one", [False, True])
@pytest.mark.parametrize("lengths", [[9, 3, 3, 2, 7], [4], [5, 5, 5], [1, 12, 1]])
def test_packed_sequences_hold_every_example_once(lengths: list[int], in_one: bool) -> None:
    rows = random_rows(lengths)
    batch = packed(rows, padding=0, in_one=in_one)
    assert batch["input_ids"].shape[1] == (sum(lengths) if in_one else max(lengths))
    found = []
    for ids, positions, labels in zip(
        batch["input_ids"].tolist(),
        batch["positions"].tolist(),
        batch["labels"].tolist(),
        strict=True,
    ):
        starts = [i for i, position in enumerate(positions) if position == 0]
        for begin, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            assert positions[begin:end] == list(range(end - begin))
            found.append((ids[begin:end], labels[begin:end]))
    expected = [(r["input_ids"], [IGNORED, *r["labels"][1:]]) for r in rows]
    filled = [(ids, labels) for ids, labels in found if set(ids) != {0}]
    assert sorted(filled) == sorted(expected)
    assert all(set(labels) == {IGNORED} for ids, labels in found if set(ids) == {0})


def test_bins_are_few() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        lengths = torch.randint(1, 101, (40,), generator=generator).tolist()
        bins = first_fit_decreasing(lengths, 100)
        assert sorted(i for chosen in bins for i in chosen) == list(range(40))
        assert all(sum(lengths[i] for i in chosen) <= 100 for chosen in bins)
        assert len(bins) <= 11 / 9 * math.ceil(sum(lengths) / 100) + 1  # its guarantee


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_the_loss_of_packed_examples_is_that_of_padded_ones(family: str) -> None:
    rows = random_rows([17, 5, 9, 2, 30, 11])
    found = []
    for batch in (padded(rows, 0), packed(rows, 0), packed(rows, 0, in_one=True)):
        model = families.build(family).train()
        total, count = summed_loss(model, **{"attention_mask": None, **batch})
        total.backward()
        gradient = model.get_input_embeddings().weight.grad
        found.append((total.detach(), count, gradient[1:]))  # of padding there may be rounding
    for total, count, gradient in found[1:]:
        assert count == found[0][1]
        torch.testing.assert_close(total, found[0][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gradient, found[0][2], rtol=1e-3, atol=1e-4)


def test_a_training_on_packed_examples_is_that_on_padded_ones(
    pruned: Path, uneven: Path, tmp_path: Path
) -> None:
    changes = {"max_length": 128, "batch_size": 8, "micro_batch_size": 8}
    padding, packing = (
        run_directly(
            config(pruned, uneven, tmp_path, packing=choice, **changes), tmp_path / str(choice)
        )
        for choice in (False, True)
    )
    assert losses(packing) == pytest.approx(losses(padding), rel=1e-4)
    for name, tensor in adapter(padding).items():
        torch.testing.assert_close(adapter(packing)[name], tensor, rtol=1e-2, atol=1e-4)


def test_a_step_is_the_same_however_uneven_answers_are_shared_out(
    pruned: Path, tmp_path: Path
) -> None:
    """Each label weighs the same in an accumulated batch, as in one forward over all of it."""
    rows = [{"prompt": "a", "completion": "x" * n} for n in (1, 40, 3, 90, 7, 20, 2, 60)]
    data = tiny.write_jsonl(tmp_path / "data.jsonl", rows)
    found = []
    for size, packing in ((8, False), (8, True), (1, False), (1, True)):
        changes = {"batch_size": 8, "micro_batch_size": size, "packing": packing, "steps": 1}
        folder = run_directly(
            config(pruned, data, tmp_path, **changes), tmp_path / f"{size}-{packing}"
        )
        found.append([lines(folder, key)[0][1] for key in ("loss", "grad_norm")])
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4)
