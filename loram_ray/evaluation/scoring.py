"""Scoring a model on held-out data; runs inside the actor."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from loram_ray.adapter import own_template
from loram_ray.config import EvaluateConfig, TextConfig
from loram_ray.corpus.conversations import Conversation
from loram_ray.corpus.examples import load_examples
from loram_ray.corpus.pack import end_of_text, pack, tokenise
from loram_ray.corpus.read import BadRow, documents, list_units, refuse_bad_rows
from loram_ray.errors import LoramError
from loram_ray.evaluation.scores import answer_likelihood, exact_matches, text_likelihood
from loram_ray.modeling import load_model, load_tokenizer, parameters_and_bytes
from loram_ray.progress import METRICS_FILE, MetricsLog
from loram_ray.waiting import alone


def score(config: EvaluateConfig, work: Path) -> dict[str, float | int]:
    """Compute the scores; runs inside the actor."""
    with alone(work), torch.inference_mode():
        started = time.perf_counter()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        template = config.chat_template or own_template(config.adapter)
        tokenizer = load_tokenizer(config.model, template, "evaluate.chat_template")
        model = load_model(config.model, config.precision, device)
        count, nbytes = parameters_and_bytes(model.parameters())
        scores: dict[str, float | int] = {"model_parameters": count, "model_bytes": nbytes}
        causal_lm: Any = model
        if config.adapter is not None:
            causal_lm = with_adapter(model, config.model, config.adapter, "evaluate.adapter")
        causal_lm.eval()
        log = _Progress(MetricsLog(work / METRICS_FILE))
        if config.data is not None:
            scores.update(_score_answers(causal_lm, tokenizer, config, log))
        if config.text is not None:
            scores.update(_score_text(causal_lm, tokenizer, config.text, config.batch_size, log))
        return {**scores, "seconds": time.perf_counter() - started}


def with_adapter(model: Any, directory: str, adapter: Path, key: str) -> Any:
    """Put an adapter on a model; what comes back is a causal LM of transformers.

    Args:
        model: as it was loaded.
        directory: where from.
        adapter: directory of the adapter.
        key: configuration key or option to name.

    Raises:
        LoramError: an adapter for another model.
    """
    from loram_ray.finetuning.masked import put_adapter_on

    try:
        return put_adapter_on(model, directory, adapter).get_base_model()
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise LoramError(
            f"{key} {adapter} does not fit the model ({reason:.300}); "
            "use the model that it was trained for"
        ) from error


class _Progress:
    """Counts rows done and writes them where the driver looks."""

    def __init__(self, log: MetricsLog) -> None:
        self._log = log
        self._done = 0
        self.total = 0

    def advance(self, rows: int) -> None:
        self._done += rows
        self._log.write(self._done, total=self.total)


def _score_answers(
    model: Any, tokenizer: Any, config: EvaluateConfig, log: _Progress
) -> dict[str, float | int]:
    assert config.data is not None
    rows = list(
        load_examples(
            tokenizer,
            config.data,
            config.max_length,
            config.max_bad_share,
            "evaluate.data",
            config.limit,
        )
    )
    asked = [row for row, _ in rows if isinstance(row, Conversation)]
    if config.exact_match and len(asked) < len(rows):
        raise LoramError(
            "evaluate.exact_match needs questions with answers, "
            f"{config.data} holds plain text; set it to false or give other data"
        )
    log.total += len(rows) * (2 if config.exact_match else 1)
    examples = [example for _, example in rows]
    likelihood = answer_likelihood(
        model, examples, end_of_text(tokenizer), config.batch_size, log.advance
    )
    scores: dict[str, float | int] = {
        "answer_perplexity": likelihood.perplexity,
        "answer_tokens": likelihood.tokens,
        "examples": len(rows),
    }
    if config.exact_match:
        matches = exact_matches(
            model, tokenizer, asked, config.batch_size, config.max_new_tokens, log.advance
        )
        scores["exact_match"] = matches / len(rows)
    return scores


def _score_text(
    model: Any, tokenizer: Any, corpus: TextConfig, batch_size: int, log: _Progress
) -> dict[str, float | int]:
    bad: list[BadRow] = []
    good = 0

    def texts() -> Iterator[str]:
        nonlocal good
        for unit in list_units(corpus.sources, "evaluate.text.sources"):
            for document in documents(unit):
                if isinstance(document, BadRow):
                    bad.append(document)
                else:
                    good += 1
                    yield document

    sequences, lengths = pack(
        tokenise(tokenizer, texts()), corpus.sequence_length, end_of_text(tokenizer)
    )
    key = "evaluate.text.max_bad_share"
    refuse_bad_rows(bad, good + len(bad), corpus.max_bad_share, key)
    if not len(sequences):
        raise LoramError("evaluate.text.sources must hold text, no document was found; add some")
    log.total += len(sequences)
    likelihood = text_likelihood(
        model,
        torch.from_numpy(sequences).long(),
        torch.from_numpy(lengths).long(),
        batch_size,
        log.advance,
    )
    return {"text_perplexity": likelihood.perplexity, "text_tokens": likelihood.tokens}
