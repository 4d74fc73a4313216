"""LoRA training on a frozen model, on transformers' Trainer; runs inside the actor."""

from __future__ import annotations

import functools
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from loram_ray.adapter import ADAPTER_FILE, CONFIG_FILE
from loram_ray.architectures import Architecture
from loram_ray.config import LoraConfig, TrainConfig
from loram_ray.corpus.examples import ExampleTable, collate, load_examples
from loram_ray.corpus.pack import end_of_text
from loram_ray.errors import LoramError
from loram_ray.finetuning.masked import put_adapter_on
from loram_ray.losses import summed_loss
from loram_ray.memory import peak_memory_gb
from loram_ray.modeling import family_of, load_model, load_tokenizer, parameters_and_bytes
from loram_ray.progress import METRICS_FILE, MetricsLog
from loram_ray.tensorfile import TensorSpec, TensorWriter
from loram_ray.waiting import alone

_COMPLETE = "complete"


@dataclass(frozen=True)
class TrainingSummary:
    """What a training was.

    Attributes:
        examples: examples in the data.
        tokens: tokens trained on, prompts included.
        trained_parameters: of the adapter.
        model_parameters: of the frozen model.
        model_bytes: of the frozen model's weights.
        seconds: of this attempt.
    """

    examples: int
    tokens: int
    trained_parameters: int
    model_parameters: int
    model_bytes: int
    seconds: float


class LoraTrainer(Trainer):
    """Trainer whose loss applies the output head only where a label is."""

    def __init__(self, *args: Any, autocast: torch.dtype | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._autocast = autocast
        self.model_accepts_loss_kwargs = True  # the loss is normalised over the whole batch

    def compute_loss(  # type: ignore[override]
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Mean loss over the labels of the whole accumulated batch."""
        device = inputs["input_ids"].device.type
        with torch.autocast(device, self._autocast, enabled=self._autocast is not None):
            causal_lm = self.accelerator.unwrap_model(model).get_base_model()
            total, count = summed_loss(causal_lm, **inputs)
        return total / (count if num_items_in_batch is None else num_items_in_batch)


class _Watch(TrainerCallback):
    """Writes metrics.jsonl, marks whole checkpoints, stops at a loss that is not finite."""

    def __init__(self, log: MetricsLog, batch_size: int) -> None:
        self._log = log
        self._batch_size = batch_size
        self._last = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise LoramError(
                f"train: the loss is {logs['loss']} at step {state.global_step}; lower "
                "train.optimiser.learning_rate or look at the examples"
            )
        now = time.perf_counter()
        self._log.write(
            state.global_step,
            loss=logs["loss"],
            lr=logs["learning_rate"],
            grad_norm=float(logs["grad_norm"]),
            memory_gb=peak_memory_gb(),
            examples_per_s=self._batch_size / (now - self._last),
        )
        self._last = now

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (folder / _COMPLETE).touch()


def lora_config(config: LoraConfig, family: Architecture) -> peft.LoraConfig:
    """PEFT's configuration of an adapter; targets default to the family's pruned linears."""
    targets = list(config.targets or family.target_names())
    if config.lm_head:
        targets.append(family.output_head)
    return peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=targets,
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),  # type: ignore[arg-type]
        use_rslora=config.use_rslora,
        task_type="CAUSAL_LM",
    )


def train_adapter(config: TrainConfig, work: Path, output: Path) -> TrainingSummary:
    """Train an adapter, continuing from the last whole checkpoint in ``work``.

    Args:
        config: the stage's configuration.
        work: checkpoints and metrics; survives an interruption.
        output: directory that gets the adapter.

    Raises:
        LoramError: no usable example, or a target that the model does not have.
    """
    with alone(work):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        tokenizer = load_tokenizer(config.model)
        rows = load_examples(
            tokenizer, config.data, config.max_length, config.max_bad_share, "train"
        )
        table = ExampleTable.write((example for _, example in rows), work / "examples.arrow")
        torch.manual_seed(config.seed)
        frozen = load_model(config.model, config.precision, device)
        model = _with_adapter(
            frozen, lora_config(config.lora, family_of(config.model)), config.model
        )
        save_memory(model, config)
        trainer = _trainer(model, table, end_of_text(tokenizer), config, work, device)
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=_last_checkpoint(work))
        save_adapter(model, output)
        base = (p for n, p in model.named_parameters() if "lora_" not in n)
        model_parameters, model_bytes = parameters_and_bytes(base)
        return TrainingSummary(
            examples=len(table),
            tokens=_tokens_seen(table, config),
            trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            model_parameters=model_parameters,
            model_bytes=model_bytes,
            seconds=time.perf_counter() - started,
        )


def save_memory(model: peft.PeftModel, config: TrainConfig) -> None:
    """Have a model keep less for the backward pass.

    PEFT turns the inputs of a LoRA into float32, the dtype of its weights, which autocast then
    turns back: where autocast is on, that costs memory and changes nothing.
    """
    if config.precision == "bf16":
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.cast_input_dtype_enabled = False  # type: ignore[assignment]
    if config.activation_checkpointing:
        base: PreTrainedModel = model.get_base_model()  # type: ignore[assignment]
        base.activation_checkpointing_enable({"use_reentrant": False})


def _with_adapter(
    frozen: PreTrainedModel, config: peft.LoraConfig, directory: Path
) -> peft.PeftModel:
    """Put a new adapter on a model, under the masks of its plan where it has some."""
    try:
        return put_adapter_on(frozen, directory, config)
    except ValueError as error:
        raise LoramError(
            f"train.lora.targets must name linears of the model, got {config.target_modules} "
            f"({error}); see the model's modules"
        ) from error


def _trainer(
    model: peft.PeftModel,
    table: ExampleTable,
    padding: int,
    config: TrainConfig,
    work: Path,
    device: str,
) -> LoraTrainer:
    optimiser = config.optimiser
    arguments = TrainingArguments(
        output_dir=str(work / "checkpoints"),
        max_steps=config.steps,
        per_device_train_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.batch_size // config.micro_batch_size,
        learning_rate=optimiser.learning_rate,
        weight_decay=optimiser.weight_decay,
        max_grad_norm=optimiser.max_grad_norm,
        warmup_steps=optimiser.warmup_steps,
        lr_scheduler_type=("cosine" if optimiser.schedule == "cosine" else "constant_with_warmup"),
        save_strategy="steps",
        save_steps=config.checkpoint_every,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=device == "cpu",
        seed=config.seed,
        data_seed=config.seed,
        remove_unused_columns=False,
    )
    resume_at = _step_of(_last_checkpoint(work))
    log = MetricsLog(work / METRICS_FILE, resume_at)
    trainer = LoraTrainer(
        model=model,
        args=arguments,
        train_dataset=table,
        data_collator=functools.partial(collate, padding=padding),
        callbacks=[_Watch(log, config.batch_size)],
        autocast=torch.bfloat16 if config.precision == "bf16" else None,
    )
    return trainer


def _last_checkpoint(work: Path) -> str | None:
    """The newest checkpoint that was written whole."""
    whole = sorted((work / "checkpoints").glob(f"checkpoint-*/{_COMPLETE}"), key=_step_of)
    return str(whole[-1].parent) if whole else None


def _step_of(path: Path | str | None) -> int:
    if path is None:
        return 0
    folder = Path(path).parent if Path(path).name == _COMPLETE else Path(path)
    return int(folder.name.removeprefix("checkpoint-"))


def _tokens_seen(table: ExampleTable, config: TrainConfig) -> int:
    mean = sum(len(table[i]["input_ids"]) for i in range(len(table))) / len(table)
    return round(mean * config.batch_size * config.steps)


def save_adapter(model: peft.PeftModel, output: Path) -> None:
    """Write PEFT's two files: ``adapter_model.safetensors`` and ``adapter_config.json``."""
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(state.items())}
    specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in state.items()}
    writer = TensorWriter(output / ADAPTER_FILE, specs)
    for name, tensor in state.items():
        writer.write(name, tensor)
    writer.finish()
    config = model.peft_config["default"]
    saved = {**config.to_dict(), "inference_mode": True, "auto_mapping": None}
    text = json.dumps(saved, indent=2, sort_keys=True, default=_jsonable)
    (output / CONFIG_FILE).write_text(text + "\n")


def _jsonable(value: object) -> object:
    if isinstance(value, set):
        return sorted(value)
    return str(value)
