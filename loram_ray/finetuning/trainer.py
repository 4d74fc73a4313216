"""LoRA training on a frozen model with transformers' Trainer, run inside the actor."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from peft.optimizers import create_loraplus_optimizer
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from loram_ray.artifacts.disk import full_disk, is_full
from loram_ray.config import TrainConfig
from loram_ray.corpus.batches import longest_first, packed, padded
from loram_ray.corpus.examples import ExampleTable
from loram_ray.errors import LoramError
from loram_ray.finetuning.adapters import save_adapter
from loram_ray.finetuning.eva import explain_inputs
from loram_ray.finetuning.examples import tables
from loram_ray.finetuning.frozen import FrozenModel
from loram_ray.finetuning.lockstep import Lockstep, Slot
from loram_ray.finetuning.summary import TrainingSummary
from loram_ray.models.loading import parameters_and_bytes
from loram_ray.models.tokenizer import end_of_text, load_tokenizer
from loram_ray.runtime.locks import alone
from loram_ray.runtime.memory import peak_memory_gb
from loram_ray.runtime.progress import METRICS_FILE, MetricsLog

_OPTIMISERS = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}
_COMPLETE = "complete"


class LoraTrainer(Trainer):
    """Trainer that applies the output head only at positions with labels."""

    def __init__(
        self,
        *args: Any,
        frozen: FrozenModel,
        b_learning_rate_ratio: float,
        slot: Slot | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._frozen, self._slot = frozen, slot
        self._summed_loss = frozen.summed_loss if slot is None else slot.summed_loss
        self._b_learning_rate_ratio = b_learning_rate_ratio
        self.model_accepts_loss_kwargs = True  # the loss is normalised over the whole batch

    def compute_loss(  # type: ignore[override]
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return the mean loss over the labels of the whole accumulated batch."""
        causal_lm = self.accelerator.unwrap_model(model).get_base_model()
        total, count = self._summed_loss(causal_lm, inputs)
        return total / (count if num_items_in_batch is None else num_items_in_batch)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:  # type: ignore[override]
        """Return the mean loss over the labels of the held-out examples, without keeping logits.

        No random numbers are drawn, so evaluation does not change the training.
        """
        model: Any = self.model
        examples: Any = self.eval_dataset
        size = self.args.per_device_eval_batch_size

        def judge() -> float:
            causal_lm = model.get_base_model()
            return mean_loss(self._frozen, causal_lm, examples, self.data_collator, size)

        loss = judge() if self._slot is None else self._slot.compute(judge)
        model.train()
        metrics = {"eval_loss": loss}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create the configured AdamW, with a separate learning rate for B if one is set."""
        if self.optimizer is None and self._b_learning_rate_ratio != 1:
            adapted: Any = self.model
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, adapted)
            self.optimizer = create_loraplus_optimizer(
                adapted,
                kind,
                loraplus_lr_ratio=self._b_learning_rate_ratio,
                loraplus_weight_decay=self.args.weight_decay,
                **settings,
            )
        return super().create_optimizer(model)


def mean_loss(
    frozen: FrozenModel,
    causal_lm: PreTrainedModel,
    examples: ExampleTable,
    collate: Callable[..., dict[str, torch.Tensor]],
    size: int,
) -> float:
    """Return the mean loss over the labels of examples in nats, without keeping logits.

    No random numbers are drawn.

    Args:
        frozen: The loaded model.
        causal_lm: Shell of the model with an adapter; left in evaluation mode.
        examples: Examples to evaluate on.
        collate: Makes a batch of several examples.
        size: Number of examples per forward pass.
    """
    causal_lm.eval()
    lengths = examples.lengths
    total = count = 0.0
    with torch.no_grad():
        for numbers in longest_first(range(len(lengths)), lengths.__getitem__, size):
            batch = collate([examples[number] for number in numbers])
            loss, labels = frozen.summed_loss(
                causal_lm, {name: tensor.to(frozen.device) for name, tensor in batch.items()}
            )
            total += float(loss)
            count += float(labels)
    return total / count


class _Watch(TrainerCallback):
    """Writes metrics.jsonl, marks complete checkpoints, and stops at a non-finite loss."""

    def __init__(
        self, log: MetricsLog, batch_size: int, on_evaluation: Callable[[int, float], None]
    ) -> None:
        self._log = log
        self._batch_size = batch_size
        self._on_evaluation = on_evaluation
        self._judged: float | None = None
        self._last = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs is None or not {"loss", "eval_loss"} & logs.keys():
            return
        kind = "loss" if "loss" in logs else "eval_loss"
        if not math.isfinite(logs[kind]):
            raise LoramError(
                f"train: the {kind} is {logs[kind]} at step {state.global_step}; lower "
                "train.optimiser.learning_rate or inspect the examples"
            )
        now = time.perf_counter()
        if kind == "eval_loss":
            self._log.write(state.global_step, eval_loss=logs[kind])
            self._judged = logs[kind]
            self._last = now
            return
        self._log.write(
            state.global_step,
            loss=logs["loss"],
            lr=logs["learning_rate"],
            grad_norm=float(logs["grad_norm"]),
            memory_gb=peak_memory_gb(),
            examples_per_s=self._batch_size / (now - self._last),
        )
        self._last = now

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.load_best_model_at_end and state.global_step >= state.max_steps:
            control.should_evaluate = True  # evaluate the steps since the last evaluation

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (folder / _COMPLETE).touch()
        if self._judged is not None:
            self._on_evaluation(state.global_step, self._judged)
            self._judged = None


def train_adapter(
    config: TrainConfig,
    work: Path,
    output: Path,
    frozen: FrozenModel | None = None,
    lockstep: Lockstep | None = None,
    on_evaluation: Callable[[int, float], None] = lambda step, loss: None,
) -> TrainingSummary:
    """Train an adapter, resuming from the last complete checkpoint in ``work``.

    Args:
        config: Configuration of the train stage.
        work: Directory of checkpoints and metrics, which survives an interruption.
        output: Directory to write the adapter to: the one with the best held-out loss, or the last.
        frozen: Loaded model, which is not changed. Default: load it.
        lockstep: Trainings on the same model, in threads of their own, to join.
        on_evaluation: Called with the step and the held-out loss when the step's checkpoint is
            complete. An exception that it raises ends the training.

    Raises:
        LoramError: There is no usable example, or the model lacks a target.
    """
    with alone(work):
        tokenizer = load_tokenizer(config.model, config.chat_template, "train.chat_template")
        learnt, held_out = tables(config, tokenizer, work)
        frozen = frozen or FrozenModel.load(config)
        model_parameters, model_bytes = parameters_and_bytes(frozen.model.parameters())
        place = contextlib.nullcontext() if lockstep is None else lockstep.slot()
        with place as slot, frozen.adapted(config) as model:
            trainer = _trainer(
                model,
                learnt,
                held_out,
                end_of_text(tokenizer),
                config,
                work,
                frozen,
                slot,
                on_evaluation,
            )
            started = time.perf_counter()
            last = _last_checkpoint(work)
            if config.lora.init == "eva" and last is None:
                begin = functools.partial(explain_inputs, model, learnt, config, frozen)
                begin() if slot is None else slot.compute(begin)
            _train_and_save(trainer, last, model, output, work)
            steps, best = trainer.state.global_step, trainer.state.best_model_checkpoint
            return TrainingSummary(
                examples=len(learnt),
                tokens=round(learnt.tokens / len(learnt) * config.batch_size * steps),
                trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
                model_parameters=model_parameters,
                model_bytes=model_bytes,
                seconds=time.perf_counter() - started,
                steps=steps,
                held_out=0 if held_out is None else len(held_out),
                best_step=None if best is None else _step_of(best),
                eval_loss=trainer.state.best_metric,
            )


def _train_and_save(
    trainer: LoraTrainer, last: str | None, model: Any, output: Path, work: Path
) -> None:
    """Train from the last checkpoint, if any, and write the adapter; name a full disk."""
    try:
        trainer.train(resume_from_checkpoint=last)
        save_adapter(model, output)
    except LoramError:
        raise
    except Exception as error:  # each library that writes raises its own error
        if is_full(error, work):
            raise _full_disk(work, trainer.state.global_step) from error
        raise


def _trainer(
    model: peft.PeftModel,
    learnt: ExampleTable,
    held_out: ExampleTable | None,
    padding: int,
    config: TrainConfig,
    work: Path,
    frozen: FrozenModel,
    slot: Slot | None,
    on_evaluation: Callable[[int, float], None],
) -> LoraTrainer:
    optimiser = config.optimiser
    save_every = config.checkpoint_every if held_out is None else config.evaluate_every
    arguments = TrainingArguments(
        output_dir=str(work / "checkpoints"),
        max_steps=config.steps,
        per_device_train_batch_size=config.micro_batch_size,
        per_device_eval_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.batch_size // config.micro_batch_size,
        optim=_OPTIMISERS[optimiser.name],
        learning_rate=optimiser.learning_rate,
        weight_decay=optimiser.weight_decay,
        max_grad_norm=optimiser.max_grad_norm,
        warmup_steps=optimiser.warmup_steps,
        lr_scheduler_type=("cosine" if optimiser.schedule == "cosine" else "constant_with_warmup"),
        eval_strategy="no" if held_out is None else "steps",
        eval_steps=config.evaluate_every,
        save_strategy="steps",
        save_steps=save_every,
        save_total_limit=2,
        load_best_model_at_end=held_out is not None,
        metric_for_best_model="eval_loss",
        restore_callback_states_from_checkpoint=config.patience is not None,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=frozen.device == "cpu",
        seed=config.seed,
        data_seed=config.seed,
        remove_unused_columns=False,
    )
    log = MetricsLog(work / METRICS_FILE, _step_of(_last_checkpoint(work)))
    callbacks: list[TrainerCallback] = [_Watch(log, config.batch_size, on_evaluation)]
    if config.patience is not None:
        callbacks.append(EarlyStoppingCallback(config.patience))
    return LoraTrainer(
        model=model,
        args=arguments,
        train_dataset=learnt,
        eval_dataset=held_out,
        data_collator=collator_of(config, padding),
        callbacks=callbacks,
        frozen=frozen,
        b_learning_rate_ratio=optimiser.b_learning_rate_ratio,
        slot=slot,
    )


def collator_of(config: TrainConfig, padding: int) -> Callable[..., dict[str, torch.Tensor]]:
    """Return the function that makes a batch of a training's examples."""
    if not config.packing:
        return functools.partial(padded, padding=padding)
    in_one = config.attention == "flash_attention_2"
    return functools.partial(packed, padding=padding, in_one=in_one)


def _full_disk(work: Path, step: int) -> LoramError:
    last = _last_checkpoint(work)
    kept = "there is no checkpoint yet" if last is None else f"the last good checkpoint is {last}"
    return LoramError(f"{full_disk('train', work, step)}; {kept}")


def _last_checkpoint(work: Path) -> str | None:
    """Return the newest complete checkpoint."""
    whole = sorted((work / "checkpoints").glob(f"checkpoint-*/{_COMPLETE}"), key=_step_of)
    return str(whole[-1].parent) if whole else None


def _step_of(path: Path | str | None) -> int:
    if path is None:
        return 0
    folder = Path(path).parent if Path(path).name == _COMPLETE else Path(path)
    return int(folder.name.removeprefix("checkpoint-"))
