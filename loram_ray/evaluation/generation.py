"""Generation of answers to batches of prompts."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loram_ray.corpus.templates import end_of_answer
from loram_ray.evaluation.engine import Engine
from loram_ray.models.tokenizer import continuation

_MARGIN = 4
"""Number of additional tokens in which to search for stop texts."""
_CONTEXT = 4
"""Number of tokens before these, for correct decoding."""


@dataclass(frozen=True)
class Sampling:
    """How answers are generated.

    Attributes:
        max_new_tokens: Maximum number of generated tokens.
        stop: Texts that end an answer; it is cut off before the first of them.
        temperature: Sampling temperature; None takes the likeliest token.
        top_p: Probability mass to sample from.
    """

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float | None = None
    top_p: float = 1.0


def answers(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    begin: int = 0,
    seed: int = 0,
) -> list[str]:
    """Generate an answer to each prompt.

    Args:
        engine: Model to generate with.
        prompts: Token ids of each prompt.
        sampling: How answers are generated.
        begin: Number of tokens that all prompts begin with, less than the length of any prompt.
            These are computed once and cached between calls.
        seed: Seed of torch's random numbers, if answers are sampled.

    Returns:
        The text of each answer.
    """
    ends = stop_tokens(engine.model, engine.tokenizer)
    longest = max(map(len, prompts))
    if engine.window() is not None and longest + sampling.max_new_tokens > (engine.window() or 0):
        begin = 0
    ids, mask = _padded(prompts, begin, longest, engine.padding)
    options: dict[str, Any] = {"do_sample": False}
    if sampling.temperature is not None:
        torch.manual_seed(seed)
        options = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": 0,
        }
    if begin:
        options["past_key_values"] = engine.begun(prompts[0][:begin], len(prompts))
    if sampling.stop:
        from transformers import StoppingCriteriaList

        options["stopping_criteria"] = StoppingCriteriaList(
            [_Stops(engine.tokenizer, sampling.stop, longest)]
        )
    model: Any = engine.model
    generated = model.generate(
        input_ids=torch.tensor(ids, device=engine.device),
        attention_mask=torch.tensor(mask, device=engine.device),
        max_new_tokens=sampling.max_new_tokens,
        pad_token_id=ends[0] if ends else engine.padding,  # fills rows that end early
        eos_token_id=ends or None,
        **options,
    )
    texts = [
        continuation(engine.tokenizer, prompt, before_end(new, ends))
        for prompt, new in zip(prompts, generated[:, longest:].tolist(), strict=True)
    ]
    return [cut_off(text, sampling.stop) for text in texts]


def _padded(
    prompts: Sequence[Sequence[int]], begin: int, longest: int, padding: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Return token ids and attention mask, padded to one length behind the shared beginning."""
    counts = [longest - len(prompt) for prompt in prompts]
    ids = [
        [*prompt[:begin], *[padding] * count, *prompt[begin:]]
        for prompt, count in zip(prompts, counts, strict=True)
    ]
    mask = [[1] * begin + [0] * count + [1] * (longest - begin - count) for count in counts]
    return ids, mask


def before_end(ids: Sequence[int], ends: Collection[int]) -> list[int]:
    """Return the generated tokens before the first end token."""
    return list(itertools.takewhile(lambda token: token not in ends, ids))


def cut_off(text: str, stops: Sequence[str]) -> str:
    """Return the part of a text before the first stop text."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer, of the model, the tokenizer and the chat template."""
    of_model = model.generation_config.eos_token_id
    listed = [*of_model] if isinstance(of_model, list | tuple) else [of_model]
    ends = [*listed, tokenizer.eos_token_id]
    if tokenizer.chat_template is not None:
        ends.append(end_of_answer(tokenizer, listed))
    return sorted({token for token in ends if token is not None})


class _Stops:
    """Ends a row whose latest tokens contain a stop text."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], begins: int) -> None:
        self._tokenizer, self._stops, self._begins = tokenizer, stops, begins
        self._looked_at = max(len(stop.encode()) for stop in stops) + _MARGIN

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        begin = max(self._begins, input_ids.shape[1] - self._looked_at)
        before, newest = input_ids[:, max(begin - _CONTEXT, 0) : begin], input_ids[:, begin:]
        texts = [
            continuation(self._tokenizer, *row, skip_special_tokens=False)
            for row in zip(before.tolist(), newest.tolist(), strict=True)
        ]
        ended = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(ended, device=input_ids.device)
