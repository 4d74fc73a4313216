"""Tasks of lm-eval, the evaluation harness, run with this package's forward passes.

lm-eval provides the tasks: data, prompts, filters and metrics. Its requests to the model are
answered here. Each context is computed once for all of its choices, and the common beginning of
prompts once for all of them.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from loram_ray.config.evaluate import HarnessConfig
from loram_ray.corpus.batches import longest_first
from loram_ray.errors import LoramError
from loram_ray.evaluation.benchmark import Scores
from loram_ray.evaluation.engine import Engine, common_beginning
from loram_ray.evaluation.generation import Sampling, answers
from loram_ray.evaluation.likelihood import Branches, nlls_of_branches
from loram_ray.models.tokenizer import ids_to_continue, render_chat

_NEW_TOKENS = 256  # default for tasks that set none
_POSITIONS = 2048  # default for models that set none
_COMMON_SENSE = (
    "arc_easy", "arc_challenge", "piqa", "hellaswag", "winogrande", "openbookqa"
)  # fmt: skip
"""Tasks whose mean accuracy LoRAM's paper reports as CSR."""
_BEGINNING = 64
"""Number of tokens that identify prompts with the same few-shot examples."""


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """Model interface that lm-eval calls.

    Args:
        engine: Model to answer with.
        batch_size: Number of items per forward pass.
        advance: Called with the number of newly answered requests.
        seed: Seed of sampling.
    """

    def __init__(
        self, engine: Engine, batch_size: int, advance: Callable[[int], None], seed: int
    ) -> None:
        super().__init__()
        self.tokenizer: Any = engine.tokenizer
        self._engine, self._batch_size = engine, batch_size
        self._advance, self._seed = advance, seed
        config = engine.model.config
        self.max_length: int = getattr(config, "max_position_embeddings", None) or _POSITIONS

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer in lm-eval's caches."""
        return str(self.tokenizer.name_or_path)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as text, up to where the answer begins or continues."""
        return render_chat(
            self.tokenizer,
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return token ids; special tokens are added as the tokenizer does by default."""
        begins = string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        if not begins if add_special_tokens is None else add_special_tokens:
            return ids_to_continue(self.tokenizer, string)
        ids: list[int] = self.tokenizer(string, add_special_tokens=False)["input_ids"]
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether it is greedy."""
        of_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, (_, context, continuation) in enumerate(requests):
            kept = max(self.max_length + 1 - len(continuation), 1)  # truncated as lm-eval does
            of_context[tuple(context[-kept:])].append(number)
        items = [
            Branches(list(context), tuple(requests[number][2] for number in numbers))
            for context, numbers in of_context.items()
        ]
        groups = list(of_context.values())
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for batch, begin in self._batches(
            [item.context for item in items], [item.tokens for item in items]
        ):
            nlls = nlls_of_branches(self._engine, [items[number] for number in batch], begin)
            for number, of_item in zip(batch, nlls, strict=True):
                for request, (nll, greedy) in zip(groups[number], of_item, strict=True):
                    found[request] = -nll, greedy
                    asked = requests[request][0]
                    if asked is not None:
                        self.cache_hook.add_partial("loglikelihood", asked, found[request])
            self._advance(sum(len(groups[number]) for number in batch))
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, in windows of the model's maximum length."""
        owners: list[int] = []
        windows: list[tuple[Any, list[int], list[int]]] = []
        for number, request in enumerate(requests):
            for context, predicted in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window((context, predicted))))
                owners.append(number)
        found = [0.0] * len(requests)
        for owner, (likelihood, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            found[owner] += likelihood
        for request, likelihood in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, likelihood)
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Generate answers up to the first stop text."""
        by_options: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            by_options[json.dumps(request.args[1], sort_keys=True)].append(number)
        found = [""] * len(requests)
        for options, numbers in by_options.items():
            sampling = _sampling(json.loads(options))
            most = max(self.max_length - sampling.max_new_tokens, 1)
            prompts = [self.tok_encode(requests[number].args[0])[-most:] for number in numbers]
            for batch, begin in self._batches(prompts, [len(prompt) for prompt in prompts]):
                said = answers(
                    self._engine,
                    [prompts[n] for n in batch],
                    sampling,
                    begin,
                    self._seed + numbers[batch[0]],
                )
                for place, answer in zip(batch, said, strict=True):
                    number = numbers[place]
                    found[number] = answer
                    self.cache_hook.add_partial("generate_until", requests[number].args, answer)
                self._advance(len(batch))
        return found

    def _batches(
        self, rows: Sequence[list[int]], costs: Sequence[int]
    ) -> Iterator[tuple[list[int], int]]:
        """Yield each batch's row indices, and the length of the beginning that its group shares."""
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, row in enumerate(rows):
            alike[tuple(row[:_BEGINNING])].append(number)
        groups = [numbers for numbers in alike.values() if len(numbers) >= self._batch_size]
        rest = [n for numbers in alike.values() if len(numbers) < self._batch_size for n in numbers]
        for group in [*groups, rest] if rest else groups:
            begin = common_beginning([rows[number] for number in group])
            for batch in longest_first(group, costs.__getitem__, self._batch_size):
                yield batch, begin


def _sampling(options: dict[str, Any]) -> Sampling:
    """Convert lm-eval's generation arguments."""
    until = options.get("until") or ()
    temperature = options.get("temperature", 0.0)
    sampled = bool(options.get("do_sample", False)) and temperature > 0
    return Sampling(
        int(options.get("max_gen_toks", _NEW_TOKENS)),
        (until,) if isinstance(until, str) else tuple(until),
        temperature if sampled else None,
        options.get("top_p", 1.0),
    )


def run_harness(
    engine: Engine,
    config: HarnessConfig,
    work: Path,
    batch_size: int,
    seed: int,
    advance: Callable[[int], None],
) -> tuple[Scores, dict[str, list[Any]]]:
    """Run tasks; requests that were answered before an interruption are read from ``work``.

    Args:
        engine: Model to evaluate.
        config: Tasks and their settings.
        work: Directory for answers.
        batch_size: Number of items per forward pass.
        seed: Seed of shots and sampling.
        advance: Called with the number of newly answered requests.

    Returns:
        Scores by ``task/metric``, each with its standard error, and the samples of each task.

    Raises:
        LoramError: lm-eval has no such task, or the task's data is not available.
    """
    model = HarnessModel(engine, batch_size, advance, seed)
    try:
        results = simple_evaluate(
            model=model,
            tasks=list(config.tasks),
            num_fewshot=config.shots,
            limit=config.limit,
            task_manager=_tasks_of(config),
            use_cache=str(work / "lm_eval"),
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except (KeyError, ValueError, OSError, ImportError, AssertionError) as error:
        raise LoramError(
            "evaluate.lm_eval.tasks must be tasks that lm-eval can load, got "
            f"{', '.join(config.tasks)} ({' '.join(str(error).split()):.300}); check the names "
            "with lm-eval ls tasks, and that their data is available"
        ) from error
    assert results is not None
    return scores_of(results["results"]), dict(results["samples"])


def _tasks_of(config: HarnessConfig) -> TaskManager:
    """Return the task index: only the user's tasks if they suffice, as lm-eval has many files."""
    if config.include_path is not None:
        own = TaskManager(include_path=str(config.include_path), include_defaults=False)
        if own.match_tasks(list(config.tasks)) == sorted(config.tasks):
            return own
        return TaskManager(include_path=str(config.include_path))
    return TaskManager()


def scores_of(results: dict[str, dict[str, Any]]) -> Scores:
    """Convert lm-eval's scores to this package's names; ``acc,none`` becomes ``acc``.

    If all six common-sense reasoning tasks are present, their mean is ``csr/acc``.
    """
    scores: Scores = {}
    for task, metrics in results.items():
        for key, value in metrics.items():
            name, _, filtered = key.partition(",")
            if not isinstance(value, int | float) or not filtered:
                continue
            metric, stderr = name.removesuffix("_stderr"), name.endswith("_stderr")
            metric += "" if filtered == "none" else f",{filtered}"
            scores[f"{task}/{metric}{'_stderr' * stderr}"] = value
    if all(f"{task}/acc" in scores for task in _COMMON_SENSE):
        count = len(_COMMON_SENSE)
        errors = [scores.get(f"{task}/acc_stderr", math.nan) for task in _COMMON_SENSE]
        scores["csr/acc"] = math.fsum(scores[f"{task}/acc"] for task in _COMMON_SENSE) / count
        scores["csr/acc_stderr"] = math.hypot(*errors) / count  # the tasks are independent
    return scores
