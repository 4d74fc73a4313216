"""The chunked loss against transformers' own loss on whole logits, in float32."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from helpers import tiny
from loram_ray.losses import IGNORED, sum_in_chunks, summed_loss

LENGTHS = (23, 9, 16)
PROMPTS = (5, 8, 0)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny.llama_config(layers=2, tied=request.param)).eval()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Three sequences padded on the right, labelled after a prompt of their own."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, tiny.VOCABULARY, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, IGNORED)
    for row, (length, prompt) in enumerate(zip(LENGTHS, PROMPTS, strict=True)):
        input_ids[row, length:] = 0
        mask[row, :length] = 1
        labels[row, prompt:length] = input_ids[row, prompt:length]
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def gradients(model: LlamaForCausalLM, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk", [1, 7, 38, 1000])
def test_value_and_gradients_are_those_of_transformers_on_whole_logits(
    model: LlamaForCausalLM, batch: dict[str, torch.Tensor], chunk: int
) -> None:
    # the first token of a sequence is predicted by nothing
    expected_count = sum(n - max(p, 1) for n, p in zip(LENGTHS, PROMPTS, strict=True))
    expected = model(**batch).loss
    expected_gradients = gradients(model, expected)

    total, count = summed_loss(model, **batch, chunk=chunk)
    assert int(count) == expected_count
    assert total.dtype == torch.float32
    torch.testing.assert_close(total / count, expected)
    found = gradients(model, total / count)
    assert found.keys() == expected_gradients.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-6, rtol=1e-4)


def test_without_a_mask_every_position_counts(model: LlamaForCausalLM) -> None:
    input_ids = torch.randint(3, tiny.VOCABULARY, (2, 12))
    total, count = summed_loss(model, input_ids, None, input_ids)
    assert int(count) == 2 * 11
    torch.testing.assert_close(total / count, model(input_ids, labels=input_ids).loss)


def test_what_stands_in_the_padding_does_not_matter(
    model: LlamaForCausalLM, batch: dict[str, torch.Tensor]
) -> None:
    before, _ = summed_loss(model, **batch)
    other = torch.where(batch["attention_mask"] == 1, batch["input_ids"], 77)
    after, _ = summed_loss(model, **{**batch, "input_ids": other})
    torch.testing.assert_close(after, before)


def test_padding_on_the_left_is_hidden_by_the_mask(
    model: LlamaForCausalLM, batch: dict[str, torch.Tensor]
) -> None:
    left = {key: value.clone() for key, value in batch.items()}
    for value in left.values():
        for row, length in enumerate(LENGTHS):
            value[row] = value[row].roll(max(LENGTHS) - length)
    total, count = summed_loss(model, **left)
    torch.testing.assert_close(total / count, model(**left).loss)
    unmasked, _ = summed_loss(model, left["input_ids"], None, left["labels"])
    assert abs(float(unmasked.detach()) - float(total.detach())) > 1e-3


def test_a_batch_is_the_sum_of_its_rows(
    model: LlamaForCausalLM, batch: dict[str, torch.Tensor]
) -> None:
    whole, count = summed_loss(model, **batch)
    rows = [
        summed_loss(model, **{k: v[i : i + 1, :length] for k, v in batch.items()})
        for i, length in enumerate(LENGTHS)
    ]
    torch.testing.assert_close(sum(total for total, _ in rows), whole)
    assert sum(int(number) for _, number in rows) == int(count)


def test_without_labels_the_loss_is_zero_and_so_are_its_gradients(
    model: LlamaForCausalLM, batch: dict[str, torch.Tensor]
) -> None:
    labels = torch.full_like(batch["labels"], IGNORED)
    labels[:, 0] = 5  # the first token is a label that nothing predicts
    total, count = summed_loss(model, **{**batch, "labels": labels})
    assert (float(total.detach()), int(count)) == (0.0, 0)
    # a step on such a batch must be possible: it happens where a sequence is one token long
    found = gradients(model, total)
    assert all(not gradient.any() for gradient in found.values())
    assert found.keys() == {name for name, _ in model.named_parameters()}


def test_the_head_is_applied_equally_often_whatever_the_labels(
    model: LlamaForCausalLM, batch: dict[str, torch.Tensor]
) -> None:
    """ZeRO-3 gathers the head at each application, together on all workers, or they hang."""
    model.lm_head.weight.ds_id = 0  # how DeepSpeed marks what it has partitioned
    calls = []
    for kept in (23, 9, 2, 0):
        labels = batch["labels"].clone()
        labels[:, kept:] = IGNORED
        seen: list[int] = []
        handle = model.lm_head.register_forward_hook(
            lambda module, inputs, output, seen=seen: seen.append(len(output))
        )
        summed_loss(model, **{**batch, "labels": labels}, chunk=7)[0].backward()
        handle.remove()
        calls.append(len(seen))
    assert len(set(calls)) == 1


def test_only_labelled_positions_reach_the_output_head(
    model: LlamaForCausalLM, batch: dict[str, torch.Tensor]
) -> None:
    reached: list[torch.Tensor] = []
    handle = model.lm_head.register_forward_pre_hook(
        lambda module, inputs: reached.append(inputs[0])
    )
    summed_loss(model, **batch)
    handle.remove()
    expected = [
        (row, position)
        for row, (length, prompt) in enumerate(zip(LENGTHS, PROMPTS, strict=True))
        for position in range(max(prompt, 1) - 1, length - 1)
    ]
    whole = model.model(batch["input_ids"], attention_mask=batch["attention_mask"])[0]
    torch.testing.assert_close(torch.cat(reached), torch.stack([whole[r, p] for r, p in expected]))


def test_logits_of_one_chunk_exist_at_a_time(
    model: LlamaForCausalLM, batch: dict[str, torch.Tensor]
) -> None:
    rows: list[int] = []
    handle = model.lm_head.register_forward_hook(
        lambda module, inputs, output: rows.append(output.shape[0])
    )
    total, count = summed_loss(model, **batch, chunk=10)
    total.backward()
    handle.remove()
    assert max(rows) == 10
    assert sum(rows) == int(count)  # the gradients are computed meanwhile


def test_the_gradients_of_a_bf16_head_are_summed_over_chunks_in_fp32() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 32, bias=False, dtype=torch.bfloat16)
    states = torch.randn(2048, 16).bfloat16()
    targets = torch.randint(0, 32, (2048,))

    def loss(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(head(states).float(), targets, reduction="sum")

    total, _ = sum_in_chunks(loss, (states, targets), len(states), head, chunk=8)
    total.backward()
    assert head.weight.grad is not None
    # The formula: outer products of softmax minus one-hot with the states, in float64.
    errors = head(states).detach().double().softmax(-1)
    errors[torch.arange(len(targets)), targets] -= 1
    exact = errors.t() @ states.double()
    error = (head.weight.grad.double() - exact).abs().max() / exact.abs().max()
    assert error < 2**-7  # one rounding to bfloat16; 256 roundings of sums are several times more
