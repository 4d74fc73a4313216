"""How good an adapter is on another model than the one it was trained on: the base."""

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
    """The loss of a training's held-out examples on a base with an adapter, in nats a label.

    Args:
        config: of the training, which holds examples out.
        base: directory of the model.
        adapter: directory of the adapter, of the base's shapes.
        work: for files of its own.
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
