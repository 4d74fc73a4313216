"""The held-out loss of an adapter on the base instead of the model that it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loram_ray.config import TrainConfig
from loram_ray.finetuning.examples import tables
from loram_ray.finetuning.frozen import FrozenModel
from loram_ray.finetuning.masked import put_adapter_on
from loram_ray.finetuning.trainer import collator_of, mean_loss
from loram_ray.models.tokenizer import end_of_text, load_tokenizer
from loram_ray.runtime.locks import alone


def held_out_loss(config: TrainConfig, base: Path, adapter: Path, work: Path) -> float:
    """Return the loss of a base with an adapter on a training's held-out examples.

    Args:
        config: Configuration of the training, with held-out examples.
        base: Directory of the base model.
        adapter: Directory of the adapter, with the base's shapes.
        work: Directory for temporary files.

    Returns:
        The mean loss in nats per label.
    """
    work.mkdir(parents=True, exist_ok=True)
    with alone(work):
        tokenizer = load_tokenizer(config.model, config.chat_template, "train.chat_template")
        _, held_out = tables(config, tokenizer, work)
        assert held_out is not None
        frozen = FrozenModel.load(config.model_copy(update={"model": base}))
        causal_lm: Any = put_adapter_on(frozen.model, base, adapter).get_base_model()
        collate = collator_of(config, end_of_text(tokenizer))
        return mean_loss(frozen, causal_lm, held_out, collate, config.micro_batch_size)
