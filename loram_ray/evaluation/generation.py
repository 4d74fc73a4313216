"""Generated answers: what a model says after prompts, many at a time."""

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
"""Tokens looked at besides those that the longest stop text could have."""
_CONTEXT = 4
"""Tokens before them that they are decoded with."""


@dataclass(frozen=True)
class Sampling:
    """How answers are generated.

    Attributes:
        max_new_tokens: longest answer.
        stop: texts at the first of which an answer ends; what follows is cut off with it.
        temperature: of sampling; None takes the likeliest token.
        top_p: share of probability that is sampled from.
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
    """What a model answers to each prompt.

    Args:
        engine: the model.
        prompts: token ids.
        sampling: how.
        begin: tokens that all prompts begin with and that are computed once for many calls; of each
            prompt at most all but the last.
        seed: of torch's random numbers, where there is sampling.
    """
    ends = stop_tokens(engine.model, engine.tokenizer)
    longest = max(map(len, prompts))
    if engine.window() is not None and longest + sampling.max_new_tokens > (engine.window() or 0):
        begin = 0
    filling = [longest - len(prompt) for prompt in prompts]
    ids = [
        [*prompt[:begin], *[engine.padding] * count, *prompt[begin:]]
        for prompt, count in zip(prompts, filling, strict=True)
    ]
    mask = [[1] * begin + [0] * count + [1] * (longest - begin - count) for count in filling]
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
        pad_token_id=ends[0] if ends else engine.padding,  # behind a row that ended before others
        eos_token_id=ends or None,
        **options,
    )
    texts = [
        continuation(engine.tokenizer, prompt, before_end(new, ends))
        for prompt, new in zip(prompts, generated[:, longest:].tolist(), strict=True)
    ]
    return [cut_off(text, sampling.stop) for text in texts]


def before_end(ids: Sequence[int], ends: Collection[int]) -> list[int]:
    """Generated tokens before the first that ends an answer."""
    return list(itertools.takewhile(lambda token: token not in ends, ids))


def cut_off(text: str, stops: Sequence[str]) -> str:
    """A text before the first of some others in it."""
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(found)] if found else text


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens at which an answer ends: the model's, the tokenizer's, and the chat template's."""
    of_model = model.generation_config.eos_token_id
    listed = [*of_model] if isinstance(of_model, list | tuple) else [of_model]
    found = [*listed, tokenizer.eos_token_id]
    if tokenizer.chat_template is not None:
        found.append(end_of_answer(tokenizer, listed))
    return sorted({token for token in found if token is not None})


class _Stops:
    """Ends a row whose newest tokens have a stop text among them."""

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
