"""Distillation losses against the divergence written out naively, in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import loram_ray as lr
from helpers import tiny
from loram_ray.alignment.objective import PARTS, AlignmentModel
from loram_ray.distillation import TopTokens, divergence, hidden_error, top_divergence
from loram_ray.losses import IGNORED

POSITIONS, VOCABULARY = 5, 40


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    """The pruned model's and the base's, peaked enough that a few tokens hold most."""
    generator = torch.Generator().manual_seed(0)
    pruned, base = 3 * torch.randn(2, POSITIONS, VOCABULARY, generator=generator).double()
    return pruned, base


def naive_divergence(pruned: torch.Tensor, base: torch.Tensor, temperature: float) -> torch.Tensor:
    found = []
    for q_logits, p_logits in zip(pruned.tolist(), base.tolist(), strict=True):
        q = [math.exp(x / temperature) for x in q_logits]
        p = [math.exp(x / temperature) for x in p_logits]
        terms = [
            pi / sum(p) * math.log((pi / sum(p)) / (qi / sum(q)))
            for pi, qi in zip(p, q, strict=True)
        ]
        found.append(temperature**2 * sum(terms))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_divergence_is_the_formula(
    logits: tuple[torch.Tensor, torch.Tensor], temperature: float
) -> None:
    torch.testing.assert_close(
        divergence(*logits, temperature), naive_divergence(*logits, temperature)
    )
    assert divergence(logits[0], logits[0], temperature).abs().max() < 1e-12


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_top_tokens_are_the_likeliest_and_what_they_miss(
    logits: tuple[torch.Tensor, torch.Tensor], temperature: float
) -> None:
    top = TopTokens.of(logits[1], 7, temperature)
    whole = (logits[1].float() / temperature).softmax(-1)
    expected, order = whole.sort(descending=True)
    assert torch.equal(top.token_ids, order[:, :7])
    torch.testing.assert_close(top.log_probs.exp(), expected[:, :7])
    torch.testing.assert_close(top.missing, expected[:, 7:].sum(-1))
    given = logits[1].float()
    TopTokens.of(given, 7, temperature)
    assert torch.equal(given, logits[1].float()), "what was given has changed"


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("k", [1, 4, 16, 39, 40])
def test_what_top_tokens_lose_is_the_divergence_among_the_missing_times_their_mass(
    logits: tuple[torch.Tensor, torch.Tensor], k: int, temperature: float
) -> None:
    pruned, base = logits
    top = TopTokens.of(base, k, temperature)
    found = top_divergence(pruned.float(), top, temperature).double()
    whole = naive_divergence(pruned, base, temperature)
    rest = base.argsort(descending=True)[:, k:]
    among = torch.zeros(POSITIONS, dtype=torch.float64)
    if k < VOCABULARY:
        among = naive_divergence(pruned.gather(1, rest), base.gather(1, rest), temperature)
    torch.testing.assert_close(
        whole - found, top.missing.double() * among, atol=2e-5 * temperature**2, rtol=1e-4
    )


def test_the_missing_mass_bounds_what_top_tokens_lose(
    logits: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """By it times the largest logarithmic ratio of the two conditional distributions."""
    pruned, base = logits
    for k in (2, 8, 20):
        top = TopTokens.of(base, k, 1.0)
        rest = base.argsort(descending=True)[:, k:]
        ratio = base.gather(1, rest).log_softmax(-1) - pruned.gather(1, rest).log_softmax(-1)
        lost = divergence(pruned, base, 1.0) - top_divergence(pruned.float(), top, 1.0)
        assert (lost >= -1e-5).all()
        assert (lost <= top.missing * ratio.amax(-1) + 1e-5).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [3, 40])
def test_the_gradient_is_that_of_finite_differences(
    logits: tuple[torch.Tensor, torch.Tensor], k: int, temperature: float
) -> None:
    pruned, base = logits
    top = TopTokens.of(base, k, temperature)
    top = TopTokens(top.token_ids, top.log_probs.double(), top.missing.double())
    variable = pruned.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: top_divergence(x, top, temperature), variable)
    assert torch.autograd.gradcheck(lambda x: divergence(x, base, temperature), variable)


def test_the_gradient_pulls_to_the_base_on_each_token_and_on_the_others_together(
    logits: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """``q - p`` for a token that is kept, ``q (1 - m / q_others)`` for one that is not."""
    pruned = logits[0].float().requires_grad_()
    top = TopTokens.of(logits[1], 4, 1.0)
    top_divergence(pruned, top, 1.0).sum().backward()
    q = pruned.detach().softmax(-1)
    others = 1 - q.gather(1, top.token_ids).sum(-1, keepdim=True)
    expected = q * (1 - top.missing[:, None] / others)
    kept = q.gather(1, top.token_ids) - top.log_probs.exp()
    expected = expected.scatter(1, top.token_ids, kept)
    assert pruned.grad is not None
    torch.testing.assert_close(pruned.grad, expected, atol=1e-6, rtol=1e-4)


def test_a_certain_base_and_a_certain_pruned_model_give_finite_numbers() -> None:
    base = torch.full((1, VOCABULARY), -200.0)
    base[0, 3] = 200.0
    for sign in (1.0, -1.0):
        pruned = (sign * base).clone().requires_grad_()
        top = TopTokens.of(base, 2, 1.0)
        found = top_divergence(pruned, top, 1.0).sum()
        found.backward()
        assert found.isfinite() and pruned.grad is not None and pruned.grad.isfinite().all()


def test_rounded_probabilities_add_up_to_one_again(
    logits: tuple[torch.Tensor, torch.Tensor],
) -> None:
    top = TopTokens.of(logits[1], 6, 1.0)
    again = TopTokens.rounded(top.token_ids.int(), top.log_probs.half(), top.missing)
    assert again.token_ids.dtype == torch.int64
    torch.testing.assert_close(again.log_probs, top.log_probs, atol=5e-3, rtol=1e-3)
    sums = again.log_probs.exp().sum(-1) + again.missing
    torch.testing.assert_close(sums, torch.ones(POSITIONS))


def test_the_error_of_hidden_states_is_relative() -> None:
    states, target = torch.randn(2, 3, 8)
    expected = [
        (s - t).square().sum() / t.square().sum() for s, t in zip(states, target, strict=True)
    ]
    torch.testing.assert_close(hidden_error(states, target), torch.stack(expected))
    torch.testing.assert_close(hidden_error(9 * states, 9 * target), torch.stack(expected))


@pytest.fixture
def models() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """A pruned model and its base: two random ones of different sizes."""
    torch.manual_seed(0)
    pruned = LlamaForCausalLM(tiny.llama_config(layers=3, intermediate=48))
    base = LlamaForCausalLM(tiny.llama_config(layers=3)).requires_grad_(False)
    with torch.no_grad():
        pruned.lm_head.weight.mul_(20)
        base.lm_head.weight.mul_(20)
    return pruned, base


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    input_ids = torch.randint(3, tiny.VOCABULARY, (3, 20), generator=generator)
    labels = input_ids.clone()
    labels[1, 13:] = IGNORED
    return input_ids, labels


def aligning(**distillation: object) -> lr.AlignConfig:
    return lr.AlignConfig.model_validate(
        {
            "pruned": "unread",
            "output": "unread",
            "base": "unread",
            "corpus": {"sources": [{"path": "unread"}]},
            "objective": "distillation",
            "distillation": distillation,
        }
    )


def whole_sums(
    models: tuple[Any, Any], batch: tuple[torch.Tensor, torch.Tensor], temperature: float = 1.0
) -> torch.Tensor:
    """What `PARTS` are, from whole logits of the stock models; hidden states of layers 0 and 2."""
    (pruned, base), (input_ids, labels) = models, batch
    mine = pruned(input_ids, output_hidden_states=True)
    theirs = base(input_ids, output_hidden_states=True)
    wanted = labels[:, 1:] != IGNORED
    q, p = mine.logits[:, :-1][wanted], theirs.logits[:, :-1][wanted]
    nll = torch.nn.functional.cross_entropy(q, labels[:, 1:][wanted], reduction="sum")
    hidden = torch.zeros(())
    for layer in (0, 2):
        states = mine.hidden_states[layer + 1][:, :-1][wanted]
        target = theirs.hidden_states[layer + 1][:, :-1][wanted]
        hidden = hidden + ((states - target).square().sum(-1) / target.square().sum(-1)).sum() / 2
    p, q = (p / temperature).log_softmax(-1), (q / temperature).log_softmax(-1)
    return torch.stack([nll, temperature**2 * (p.exp() * (p - q)).sum(), hidden])


def test_live_sums_and_gradients_are_those_of_whole_logits(
    models: tuple[LlamaForCausalLM, LlamaForCausalLM], batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    pruned, base = models
    config = aligning(
        targets="live",
        temperature=2.0,
        causal_lm_weight=0.25,
        hidden_layers=[0, 2],
        hidden_weight=3.0,
    )
    module = AlignmentModel(pruned, config, base)
    assert dict(zip(PARTS, module.weights, strict=True)) == {
        "nll": 0.25,
        "divergence": 0.75,
        "hidden_error": 3.0,
    }
    weights = torch.tensor(module.weights)
    expected = whole_sums(models, batch, temperature=2.0)
    (expected @ weights).backward()
    expected_gradients = {n: p.grad.clone() for n, p in pruned.named_parameters()}
    pruned.zero_grad()
    loss, found = module(*batch)
    loss.backward()
    torch.testing.assert_close(loss, expected @ weights)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for name, parameter in pruned.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected_gradients[name], atol=1e-4, rtol=1e-3, msg=name
        )
    assert all(p.grad is None for p in base.parameters())


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_cached_targets_of_the_whole_vocabulary_are_live_ones(
    weight: float,
    models: tuple[LlamaForCausalLM, LlamaForCausalLM],
    batch: tuple[torch.Tensor, torch.Tensor],
) -> None:
    pruned, base = models
    live = AlignmentModel(pruned, aligning(targets="live", causal_lm_weight=weight), base)
    cached = AlignmentModel(pruned, aligning(causal_lm_weight=weight))
    top = TopTokens.of(base(batch[0]).logits, tiny.VOCABULARY, 1.0)
    gradients = []
    for module, target in ((live, None), (cached, top)):
        pruned.zero_grad()
        loss, sums = module(*batch, target)
        loss.backward()
        gradients.append((sums, {n: p.grad.clone() for n, p in pruned.named_parameters()}))
    (first, of_live), (second, of_cached) = gradients
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
    for name, gradient in of_live.items():
        torch.testing.assert_close(of_cached[name], gradient, atol=1e-4, rtol=1e-3, msg=name)


def test_the_causal_objective_is_the_papers(
    models: tuple[LlamaForCausalLM, LlamaForCausalLM], batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    config = aligning().model_copy(update={"objective": "causal_lm"})
    module = AlignmentModel(models[0], config)
    assert module.weights == (1.0, 0.0, 0.0)
    loss, sums = module(*batch)
    assert float(loss.detach()) == float(sums[0])
    assert sums[1:].tolist() == [0.0, 0.0]
    count = int((batch[1][:, 1:] != IGNORED).sum())
    expected = models[0](batch[0], labels=batch[1]).loss
    torch.testing.assert_close(sums[0] / count, expected)


def test_distillation_needs_a_base_and_hidden_states_are_live_only(tmp_path: Path) -> None:
    settings = aligning().model_dump()
    with pytest.raises(ValueError, match="base must be given with objective distillation"):
        lr.AlignConfig.model_validate({**settings, "base": None})
    with pytest.raises(ValueError, match=r"hidden_layers must be empty .* got \[3\]"):
        aligning(hidden_layers=[3])
