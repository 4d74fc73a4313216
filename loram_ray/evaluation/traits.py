"""Traits of a tokenizer that affect scores, as part of an evaluation's identity.

A tokenizer has none of these traits if it adds nothing to texts, has a padding token, and closes
answers with a special token of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loram_ray.config import EvaluateConfig
from loram_ray.config.evaluate import (
    CodeBenchmark,
    GenerationBenchmark,
    GymBenchmark,
    PerplexityBenchmark,
)
from loram_ray.corpus.conversations import forms_of
from loram_ray.corpus.templates import end_of_answer, ids_of, surroundings, visible_surroundings
from loram_ray.models.tokenizer import continuation, frame_of, ids_to_continue
from loram_ray.utils.parsing import read_json

_GENERATES = (GenerationBenchmark, CodeBenchmark, GymBenchmark)


def settings_of_reading(config: EvaluateConfig, model: Path, tokenizer: Any) -> dict[str, Any]:
    """Return the settings of an identity that describe how data and answers are read.

    Args:
        config: Configuration of the evaluation.
        model: Directory of the model.
        tokenizer: Tokenizer of the model, with the chat template in use.
    """
    perplexities = [b for b in config.benchmarks if isinstance(b, PerplexityBenchmark)]
    data = [given for given in (config.data, *(b.data for b in perplexities)) if given]
    forms = frozenset[str]().union(*(forms_of(given, "evaluate.data") for given in data))
    texts = config.text is not None or any(b.text is not None for b in perplexities)
    found: dict[str, Any] = frame_of(tokenizer).settings if texts or "text" in forms else {}
    rows = (forms - {"text"}) if config.max_bad_share else (forms & {"columns"})
    if rows:
        found["rows"] = sorted(rows)
    if ids_to_continue(tokenizer, "a") != tokenizer("a")["input_ids"]:
        found["prompts"] = "not ended"
    generates = any(isinstance(b, _GENERATES) for b in config.benchmarks) or config.lm_eval
    if generates or (config.exact_match and config.data):
        traits = [*_traits_of_answers(tokenizer), *_plain_ends(model, tokenizer)]
        if traits:
            found["answers"] = traits
    if any(isinstance(b, CodeBenchmark) for b in config.benchmarks):
        found["programs"] = "tested from another process"
    return found


def _traits_of_answers(tokenizer: Any) -> list[str]:
    found = []
    if tokenizer.pad_token_id is None:
        found.append("no padding token")
    ids = tokenizer("a a")["input_ids"]
    if continuation(tokenizer, ids[:-1], ids[-1:]) != tokenizer.decode(ids[-1:]):
        found.append("decoded with the prompt")
    if tokenizer.chat_template is not None:
        eos_id = end_of_answer(tokenizer)
        first = ids_of(tokenizer, surroundings(tokenizer).after)[:1]
        if eos_id is not None and (first != [eos_id] or eos_id not in tokenizer.all_special_ids):
            found.append(f"closed by {eos_id}")
        if any(visible_surroundings(tokenizer)):
            found.append("without the template's text")
    return found


def _plain_ends(model: Path, tokenizer: Any) -> list[str]:
    """Return the end tokens in the model's settings that are visible when decoded."""
    path = model / "generation_config.json"
    listed = read_json(path).get("eos_token_id") if path.exists() else None
    ends: list[Any] = listed if isinstance(listed, list) else [listed]
    special = {None, *tokenizer.all_special_ids}
    return [f"ended by {token}" for token in ends if token not in special]
