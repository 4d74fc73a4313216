import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import peft
import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import loram_ray as lr
from helpers import tiny
from helpers.training import (
    as_row,
    config,
    metrics,
    plain_losses,
    run_directly,
    started,
    wait_for_steps,
)
from loram_ray.artifacts.adapter import ADAPTER_FILE
from loram_ray.corpus.batches import padded
from loram_ray.corpus.examples import load_examples
from loram_ray.finetuning.trainer import train_adapter
from loram_ray.models.tokenizer import load_tokenizer
from loram_ray.plan import PLAN_FILE, PruningPlan
from loram_ray.runtime import cluster
from loram_ray.runtime.progress import METRICS_FILE


def test_checkpointed_activations_change_nothing(pruned: Path, data: Path, tmp_path: Path) -> None:
    found = []
    for name, checkpointing in (("kept", False), ("again", True)):
        lora = {"r": 4, "alpha": 8, "dropout": 0.2}
        settings = config(pruned, data, tmp_path, lora=lora, activation_checkpointing=checkpointing)
        work = run_directly(settings, tmp_path / name)
        found.append((metrics(work / "work", "loss"), load_file(work / "adapter" / ADAPTER_FILE)))
    (losses, kept), (losses_again, again) = found
    assert losses == losses_again
    assert all(torch.equal(again[key], tensor) for key, tensor in kept.items())


def test_losses_equal_a_loop_written_with_plain_transformers_and_peft(
    pruned: Path, data: Path, tmp_path: Path
) -> None:
    # one epoch and a bit: the whole data set in a batch, so that the order does not matter
    rows = tiny.questions(8)
    eight = tiny.write_jsonl(tmp_path / "eight.jsonl", rows)
    settings = config(pruned, eight, tmp_path, batch_size=8, micro_batch_size=4)
    ours = run_directly(settings, tmp_path / "ours")

    tokenizer = load_tokenizer(pruned)
    examples = [e for _, e in load_examples(tokenizer, str(eight), 64, 0.0, "train.data")]
    batch = padded([as_row(e) for e in examples], tokenizer.eos_token_id)
    torch.manual_seed(settings.seed)
    model = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM"
        ),
    )
    losses = plain_losses(model, batch)
    assert metrics(ours / "work", "loss") == pytest.approx(losses, rel=1e-4)
    assert losses[-1] < losses[0]


def test_the_adapter_is_a_standard_peft_directory_that_trains_only_lora(
    pruned: Path, data: Path, tmp_path: Path, embedded_ray: None
) -> None:
    result = lr.train(config(pruned, data, tmp_path / "adapter", lora={"r": 4, "lm_head": True}))
    saved = load_file(result.output / "adapter_model.safetensors")
    assert len(saved) == 2 * (4 * 7 + 1)
    assert all(".lora_A.weight" in name or ".lora_B.weight" in name for name in saved)
    assert PruningPlan.load(result.output).digest == PruningPlan.load(pruned).digest
    assert result.manifest.details["examples"] == 40
    model = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(model, str(result.output))
    b = loaded.base_model.model.lm_head.lora_B["default"].weight
    assert torch.equal(b, saved["base_model.model.lm_head.lora_B.weight"])
    assert b.abs().max() > 0


@pytest.mark.slow
def test_training_on_the_base_itself_gives_an_adapter_without_a_plan(
    base: Path, data: Path, tmp_path: Path, embedded_ray: None
) -> None:
    result = lr.train(config(base, data, tmp_path / "adapter", steps=1))
    assert not (result.output / PLAN_FILE).exists()
    peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(result.output)
    )


@pytest.mark.parametrize("init", ["default", "eva"])
def test_a_training_killed_and_resumed_ends_bit_equal(
    init: str, pruned: Path, data: Path, tmp_path: Path
) -> None:
    lora = {"r": 4, "dropout": 0.1, "init": init}  # dropout: random state must resume
    changes = {"steps": 12, "lora": lora}
    untouched = run_directly(config(pruned, data, tmp_path, **changes), tmp_path / "untouched")
    folder = tmp_path / "killed"
    (folder / "work").mkdir(parents=True)
    (folder / "adapter").mkdir()
    settings = config(pruned, data, tmp_path, **changes)
    process = started(settings, folder)
    wait_for_steps(folder / "work" / METRICS_FILE, 5)
    process.kill()
    process.wait()
    assert not list((folder / "adapter").iterdir())
    train_adapter(settings, folder / "work", folder / "adapter")
    assert metrics(folder / "work", "loss") == metrics(untouched / "work", "loss")
    expected = load_file(untouched / "adapter" / "adapter_model.safetensors")
    found = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.cluster
def test_a_killed_actor_is_replaced_and_the_training_ends_bit_equal(
    pruned: Path, data: Path, tmp_path: Path, embedded_ray: None
) -> None:
    changes = {"steps": 60, "checkpoint_every": 10}
    untouched = lr.train(config(pruned, data, tmp_path / "untouched", **changes)).output
    output = tmp_path / "adapter"
    killed: list[int] = []

    def kill_the_actor() -> None:
        wait_for_steps(output.with_name(".adapter.work") / METRICS_FILE, 15)
        for process in psutil.Process().children(recursive=True):
            if "_Caller" in " ".join(process.cmdline()):
                os.kill(process.pid, signal.SIGKILL)
                killed.append(process.pid)

    killer = threading.Thread(target=kill_the_actor)
    killer.start()
    lr.train(config(pruned, data, output, **changes))
    killer.join()
    assert len(killed) == 1
    expected = load_file(untouched / "adapter_model.safetensors")
    found = load_file(output / "adapter_model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_target_that_the_model_lacks_is_refused(pruned: Path, data: Path, tmp_path: Path) -> None:
    settings = config(pruned, data, tmp_path, lora={"targets": ["query"]})
    with pytest.raises(lr.LoramError, match=r"train.lora.targets .*query"):
        run_directly(settings, tmp_path / "run")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_same_seed_gives_the_same_adapter(
    precision: str, pruned: Path, data: Path, tmp_path: Path
) -> None:
    settings = config(pruned, data, tmp_path, steps=2, precision=precision)
    first = run_directly(settings, tmp_path / "first") / "adapter" / "adapter_model.safetensors"
    second = run_directly(settings, tmp_path / "second") / "adapter" / "adapter_model.safetensors"
    assert first.read_bytes() == second.read_bytes()


def test_that_bf16_is_slow_on_this_cpu_is_said_once(
    pruned: Path,
    data: Path,
    tmp_path: Path,
    embedded_ray: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cluster, "ADVISED", set())
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    cluster.advise_precision("bf16", "train")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    cluster.advise_precision("fp32", "train")
    assert "AVX-512" not in capsys.readouterr().err
    lr.train(config(pruned, data, tmp_path / "adapter", steps=1, precision="bf16"))
    cluster.advise_precision("bf16", "train")
    assert capsys.readouterr().err.count("train.precision=fp32 is many times faster") == 1


SHARING = """
import os, sys, threading, time
from pathlib import Path

import ray
from loram_ray.runtime.actors import run_in_actor
from loram_ray.runtime.cluster import gpus_per_worker, require_resources

def meet(folder, number, others):
    (folder / str(number)).touch()
    deadline = time.monotonic() + 60
    while not all((folder / str(other)).exists() for other in range(others)):
        assert time.monotonic() < deadline, "the others do not run at the same time"
        time.sleep(0.05)
    return ray.get_runtime_context().get_assigned_resources()["GPU"]

def wait(finished):
    while not finished(1):
        pass

ray.init("local", num_cpus=6, num_gpus=1, include_dashboard=False, log_to_driver=False)
folder, found = Path(sys.argv[1]), {}

def run(number):
    found[number] = run_in_actor(meet, (folder, number, 3), 1, 0, wait, gpus=0.3)

require_resources(3, 1, gpus_per_worker(0.3), "batch.workers")
threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(sorted(found.values()))
try:
    require_resources(4, 1, gpus_per_worker(0.3), "batch.workers")
except Exception as error:
    print(error)
ray.shutdown()
"""


@pytest.mark.slow
def test_actors_share_a_gpu(tmp_path: Path) -> None:
    """Ray counts a declared GPU; placement does not depend on a real one."""
    done = subprocess.run(
        [sys.executable, "-c", SHARING, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    shares, refusal = done.stdout.splitlines()
    assert shares == "[0.3, 0.3, 0.3]"
    assert "batch.workers needs 1.2 GPUs, but the Ray cluster has 1" in refusal
