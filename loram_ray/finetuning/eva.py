"""EVA: initialises A with the principal components of each linear's inputs.

Explained Variance Adaptation (https://arxiv.org/abs/2410.07170), using PEFT's incremental principal
component analysis. Ranks are not redistributed, so an adapter's shapes depend only on its settings.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.eva import (
    get_eva_state_dict,
    prepare_layer_inputs_fn_language_modeling,
)

from loram_ray.config import TrainConfig
from loram_ray.corpus.batches import Row, padded
from loram_ray.corpus.examples import ExampleTable
from loram_ray.errors import LoramError
from loram_ray.finetuning.frozen import FrozenModel
from loram_ray.losses import IGNORED, output_head

MOST_BATCHES = 1000


class _Batches:
    """Batches with at least as many labels as components, restarting at each iteration.

    PEFT iterates until the components converge, for at most `MOST_BATCHES` batches in total.
    """

    def __init__(self, rows: list[Row], size: int, rank: int) -> None:
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        self._batches = [batch for batch in batches if sum(map(_labels, batch)) >= rank]
        self._left = MOST_BATCHES
        if not self._batches:
            raise LoramError(
                f"train.lora.init = eva needs micro-batches with at least r = {rank} labels, but "
                f"no micro-batch of train.micro_batch_size = {size} has as many; raise it or lower "
                "r"
            )

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in self._batches:
            if not self._left:
                raise LoramError(
                    f"train.lora.init = eva must converge, but did not within {MOST_BATCHES:,} "
                    "batches; set it to default or lower r"
                )
            self._left -= 1
            yield padded(batch, 0)


def _labels(row: Row) -> int:
    """Return the number of predicted tokens."""
    return sum(label != IGNORED for label in row["labels"][1:])


def explain_inputs(
    model: peft.PeftModel, examples: ExampleTable, config: TrainConfig, frozen: FrozenModel
) -> None:
    """Initialise A of every adapted linear with the first principal components of its inputs.

    The rows of A have unit length. The inputs are those at label positions, computed without the
    adapter. No random numbers are drawn from torch's global state.

    Args:
        model: Model with a new adapter, changed in place.
        examples: Training examples, sampled in random order.
        config: Configuration of the training.
        frozen: Frozen model below the adapter.

    Raises:
        LoramError: There are too few labels, or the components do not converge.
    """
    size, rank = config.micro_batch_size, config.lora.r
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(config.seed))
    rows = [examples[number] for number in order[: MOST_BATCHES * size].tolist()]
    causal_lm: Any = model.get_base_model()
    head = output_head(causal_lm)
    targets = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    inputs_of = dict.fromkeys(targets, prepare_layer_inputs_fn_language_modeling)
    if isinstance(head, LoraLayer):
        inputs_of |= {name: _as_they_are for name in targets if model.get_submodule(name) is head}

    def forward(_: Any, batch: dict[str, torch.Tensor]) -> None:
        mask = batch["attention_mask"]
        with frozen.computing():
            hidden = causal_lm.get_decoder()(
                input_ids=batch["input_ids"], attention_mask=mask, use_cache=False
            )[0]
            if isinstance(head, LoraLayer):
                head(hidden[batch["labels"] != IGNORED])

    found = get_eva_state_dict(
        model,
        _Batches(rows, size, rank),
        forward_fn=forward,
        prepare_layer_inputs_fn=inputs_of,
        show_progress_bar=False,
    )
    for name, components in found.items():
        layer: Any = model.get_submodule(name)
        for a in layer.lora_A.values():
            a.weight.data.copy_(components)


def _as_they_are(layer_input: Any, model_input: Any, name: str) -> torch.Tensor:
    states: torch.Tensor = layer_input[0]
    return states
