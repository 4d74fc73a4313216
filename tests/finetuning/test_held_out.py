"""Held-out loss: as plain transformers has it, and what it stops and keeps."""

from __future__ import annotations

import signal
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

import loram_ray as lr
from helpers import tiny
from helpers.training import (
    STEPS,
    adapter,
    config,
    lines,
    losses,
    run_directly,
    started,
    wait_for_steps,
)
from loram_ray.artifacts.adapter import ADAPTER_FILE
from loram_ray.corpus.examples import ExampleTable
from loram_ray.finetuning.trainer import train_adapter
from loram_ray.models.tokenizer import load_tokenizer
from loram_ray.runtime.progress import METRICS_FILE


def test_the_held_out_loss_is_that_of_plain_transformers(
    pruned: Path, data: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"{a}*{a}=", "completion": str(a * a)} for a in range(7)]
    judged = tiny.write_jsonl(tmp_path / "judged.jsonl", rows)
    settings = config(
        pruned, data, tmp_path, eval_data=str(judged), evaluate_every=STEPS, micro_batch_size=2
    )
    folder = run_directly(settings, tmp_path / "run")
    [(step, found)] = lines(folder, "eval_loss")
    assert step == STEPS

    tokenizer = load_tokenizer(pruned)
    model = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, str(folder / "adapter")).eval()
    total = count = 0.0
    for row in rows:
        prompt = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(prompt + row["completion"] + "<|im_end|>\n")["input_ids"]
        begin = len(tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0]
        total += float(
            functional.cross_entropy(
                logits[begin - 1 : -1], torch.tensor(ids[begin:]), reduction="sum"
            )
        )
        count += len(ids) - begin
    assert found == pytest.approx(total / count, rel=1e-4)


def test_the_best_checkpoint_is_kept_and_patience_ends_the_training(
    pruned: Path, data: Path, tmp_path: Path
) -> None:
    """What is judged by contradicts what is learnt, so that its loss soon rises."""
    wrong = [{"prompt": f"{a}+{a}=", "completion": "none"} for a in range(4)]
    judged = tiny.write_jsonl(tmp_path / "judged.jsonl", wrong)
    settings = config(
        pruned,
        data,
        tmp_path,
        steps=60,
        eval_data=str(judged),
        evaluate_every=3,
        patience=2,
        optimiser={"learning_rate": 2e-2, "warmup_steps": 0},
    )
    (tmp_path / "work").mkdir()
    (tmp_path / "adapter").mkdir()
    summary = train_adapter(settings, tmp_path / "work", tmp_path / "adapter")
    judgements = lines(tmp_path, "eval_loss")
    assert [step for step, _ in judgements] == [3 * (i + 1) for i in range(len(judgements))]
    best = min(judgements, key=lambda row: row[1])
    assert (summary.best_step, summary.eval_loss) == best
    assert summary.steps == judgements[-1][0] == best[0] + 2 * 3
    assert summary.steps < 60
    checkpoint = tmp_path / "work" / "checkpoints" / f"checkpoint-{best[0]}" / ADAPTER_FILE
    kept, last = load_file(checkpoint), adapter(tmp_path)
    assert kept.keys() == last.keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in last.items())
    later = load_file(
        tmp_path / "work" / "checkpoints" / f"checkpoint-{summary.steps}" / ADAPTER_FILE
    )
    assert any(not torch.equal(later[name], tensor) for name, tensor in kept.items())


@pytest.mark.slow
def test_a_killed_training_with_evaluation_ends_bit_equal(
    pruned: Path, data: Path, tmp_path: Path
) -> None:
    """Patience has waited for part of its time when the process is killed."""
    wrong = tiny.write_jsonl(tmp_path / "judged.jsonl", [{"prompt": "1+1=", "completion": "none"}])
    settings = config(
        pruned,
        data,
        tmp_path,
        steps=40,
        eval_data=str(wrong),
        evaluate_every=2,
        patience=4,
        lora={"r": 4, "dropout": 0.1},
        optimiser={"learning_rate": 1e-2, "warmup_steps": 0},
    )
    untouched = run_directly(settings, tmp_path / "untouched")
    folder = tmp_path / "killed"
    (folder / "work").mkdir(parents=True)
    (folder / "adapter").mkdir()
    process = started(settings, folder)
    best = min(lines(untouched, "eval_loss"), key=lambda row: row[1])[0]
    wait_for_steps(folder / "work" / METRICS_FILE, (best + 4) * 3 // 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list((folder / "adapter").iterdir())
    train_adapter(settings, folder / "work", folder / "adapter")
    for key in ("loss", "eval_loss"):
        assert lines(folder, key) == lines(untouched, key)
    assert all(torch.equal(adapter(folder)[n], t) for n, t in adapter(untouched).items())


def test_a_share_held_out_is_judged_by_and_not_learnt_from(
    pruned: Path, data: Path, tmp_path: Path
) -> None:
    settings = config(pruned, data, tmp_path, eval_share=0.3, evaluate_every=3)
    folder = run_directly(settings, tmp_path / "run")
    learnt, judged = (
        ExampleTable(folder / "work" / name) for name in ("examples.arrow", "held_out.arrow")
    )
    assert len(learnt) + len(judged) == 40
    assert 4 <= len(judged) <= 20
    rows = [{tuple(table[i]["input_ids"]) for i in range(len(table))} for table in (learnt, judged)]
    assert not rows[0] & rows[1]  # equal rows, of which there are some, are on the same side
    assert [step for step, _ in lines(folder, "eval_loss")] == [3, 6]


def test_a_share_that_leaves_nothing_is_refused(pruned: Path, tmp_path: Path) -> None:
    one = tiny.write_jsonl(tmp_path / "one.jsonl", tiny.questions(1))
    settings = config(pruned, one, tmp_path, eval_share=0.5)
    with pytest.raises(lr.LoramError, match=r"train.eval_share must leave examples for both"):
        run_directly(settings, tmp_path / "run")


def test_evaluations_leave_the_training_as_it_is(pruned: Path, data: Path, tmp_path: Path) -> None:
    lora = {"r": 4, "dropout": 0.1}
    without = run_directly(config(pruned, data, tmp_path, lora=lora), tmp_path / "without")
    judged = config(pruned, data, tmp_path, lora=lora, eval_data=str(data), evaluate_every=1)
    assert losses(run_directly(judged, tmp_path / "with")) == losses(without)


@pytest.mark.slow
def test_evaluations_leave_the_training_of_nf4_as_it_is(
    pruned: Path, data: Path, tmp_path: Path
) -> None:
    """On CPUs with AVX512 for bfloat16, bitsandbytes repacks weights at the first evaluation."""
    quantized = tmp_path / "quantized"
    lr.quantize(lr.QuantizeConfig(model=pruned, output=quantized))
    without = run_directly(config(quantized, data, tmp_path), tmp_path / "without")
    judged = config(quantized, data, tmp_path, eval_data=str(data), evaluate_every=1)
    found = run_directly(judged, tmp_path / "with")
    assert losses(found) == losses(without)
    last = load_file(found / "work" / "checkpoints" / f"checkpoint-{STEPS}" / ADAPTER_FILE)
    for name, tensor in adapter(without).items():
        assert torch.equal(last[name], tensor)
        if "lora_B" in name:
            assert tensor.abs().max() > 0, name

    orthogonal = config(quantized, data, tmp_path, lora={"r": 4, "init": "orthogonal"})
    with pytest.raises(
        lr.LoramError, match=r"train.lora.init must be default, gaussian or eva on a"
    ):
        run_directly(orthogonal, tmp_path / "orthogonal")
