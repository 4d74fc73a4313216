"""An alignment's settings, and the configuration that DeepSpeed gets of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch
from safetensors.torch import save_file

import loram_ray as lr
from helpers import families
from helpers.aligning import BATCH, LENGTH, LR, config
from loram_ray.alignment.checkpoints import last_checkpoint
from loram_ray.alignment.deepspeed_config import (
    deepspeed_config,
    import_deepspeed,
    load_partitioned,
)
from loram_ray.alignment.nvme import require_async_io, size_swap_buffers
from loram_ray.alignment.universal_checkpoint import write_worker_count
from loram_ray.models.loading import DTYPES


def built(
    users: dict[str, Any] | None = None, workers: int = 1, **changes: object
) -> dict[str, Any]:
    unread = Path("unread")
    return deepspeed_config(config(unread, unread, unread, **changes), users or {}, workers)


def test_deepspeed_config_accumulates_up_to_the_global_batch() -> None:
    found = built(workers=2, zero_stage=3)
    product = math.prod(
        (found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"], 2)
    )
    assert product == found["train_batch_size"] == BATCH
    assert found["zero_optimization"] == {"stage": 3}


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_weights_are_loaded_in_the_precision_asked_for_not_in_that_of_the_file(
    tmp_path: Path, stored: torch.dtype
) -> None:
    """A base is published in bfloat16; transformers would make the model of that type."""
    families.build("llama").to(stored).save_pretrained(tmp_path)
    for precision, dtype in DTYPES.items():
        model = load_partitioned(tmp_path, {"zero_optimization": {"stage": 1}}, precision)
        assert {p.dtype for p in model.parameters()} == {dtype}


def test_a_batch_that_workers_cannot_share_evenly_is_filled_up() -> None:
    found = built(workers=3)
    assert found["gradient_accumulation_steps"] == 2
    assert found["train_batch_size"] == 3 * 2 * 2 > BATCH


def test_deepspeed_config_offloads() -> None:
    offload = {"offload_optimiser": "nvme", "offload_parameters": "cpu", "offload_dir": "/fast"}
    assert built(zero_stage=3, **offload)["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": {"device": "nvme", "nvme_path": "/fast"},
        "offload_param": {"device": "cpu"},
    }


def test_nvme_without_what_it_needs_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's own check, where no compiler can be found."""
    import_deepspeed()
    monkeypatch.setenv("PATH", "/absent")
    monkeypatch.setenv("CC", "/absent/cc")
    require_async_io(built(zero_stage=3, offload_optimiser="cpu"))
    nvme = built(zero_stage=3, offload_parameters="nvme", offload_dir="/fast")
    with pytest.raises(lr.LoramError, match="offload_parameters = nvme needs libaio") as error:
        require_async_io(nvme)
    assert "\n" not in str(error.value)


def test_a_users_deepspeed_json_wins_key_by_key() -> None:
    users = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": "auto", "overlap_comm": True, "offload_param": {"pin": 1}},
        "optimizer": {"params": {"betas": [0.9, 0.95], "lr": "auto"}},
        "comms_logger": {"enabled": True},
    }
    expected = built(zero_stage=2)
    expected["zero_optimization"] |= {"overlap_comm": True, "offload_param": {"pin": 1}}
    expected["optimizer"]["params"]["betas"] = [0.9, 0.95]
    expected["comms_logger"] = {"enabled": True}
    assert built(users, zero_stage=2) == expected


def test_another_optimiser_keeps_nothing_of_torchs() -> None:
    found = built({"optimizer": {"type": "Lion", "params": {"lr": "auto"}}})
    assert found["optimizer"] == {"type": "Lion", "params": {"lr": LR, "weight_decay": 0.0}}


@pytest.mark.parametrize(
    ("users", "message"),
    [
        ({"train_batch_size": 9}, "sets train_batch_size to 9, but align.batch_size requires 8"),
        (
            {"bf16": {"enabled": True}},
            "bf16.enabled to True, but align.precision requires False",
        ),
        (
            {"zero_optimization": {"stage": 3}},
            "zero_optimization.stage to 3, but align.zero_stage requires",
        ),
        (
            {"optimizer": {"params": {"lr": 1}}},
            "lr to 1, but align.optimiser.learning_rate",
        ),
        (
            {"scheduler": {"type": "WarmupLR"}},
            "must not set scheduler: use align.optimiser.schedule",
        ),
        ({"fp16": {"enabled": True}}, "must not set fp16"),
        ({"zero_optimization": {"overlap_comm": "auto"}}, "overlap_comm to auto, as no other key"),
    ],
)
def test_a_users_deepspeed_json_that_contradicts_is_refused(
    users: dict[str, Any], message: str
) -> None:
    with pytest.raises(lr.LoramError, match=message) as caught:
        built(users)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offload_parameters": "cpu"}, "zero_stage must be 3 to offload parameters, got 1"),
        ({"offload_optimiser": "cpu", "zero_stage": 0}, "zero_stage must be at least 1"),
        ({"offload_optimiser": "nvme", "zero_stage": 2}, "zero_stage must be 3 to offload to nvme"),
        (
            {"offload_optimiser": "nvme", "zero_stage": 3},
            "offload_dir must be given to offload to nvme",
        ),
        (
            {
                "offload_optimiser": "nvme",
                "zero_stage": 3,
                "offload_dir": "/fast",
                "workers": 2,
                "min_workers": 1,
            },
            "min_workers must not be given with offload_optimiser nvme, got 1",
        ),
        ({"tokens": 1000}, "steps and tokens must not be given together, got 6 and 1000"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        built(**changes)


def test_a_budget_of_tokens_ends_with_a_whole_step() -> None:
    unread = Path("unread")
    for tokens, steps in ((1, 1), (BATCH * LENGTH, 1), (BATCH * LENGTH + 1, 2)):
        assert config(unread, unread, unread, steps=None, tokens=tokens).total_steps == steps
    assert config(unread, unread, unread, steps=None).total_steps == 1600


def test_other_workers_cannot_go_on_with_an_optimiser_on_nvme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the folder that DeepSpeed's checkpoints then have says so."""
    saved = tmp_path / "step-00000002-1"
    (saved / "state" / "offloaded_tensors").mkdir(parents=True)
    write_worker_count(saved, 2)
    monkeypatch.setattr("ray.train.get_checkpoint", lambda: ray.train.Checkpoint(str(saved)))
    assert last_checkpoint(tmp_path, worker=0, workers=2) == (saved, False)
    with pytest.raises(lr.LoramError, match=r"align.workers must be 2, .* = nvme\), got 3"):
        last_checkpoint(tmp_path, worker=0, workers=3)


@pytest.mark.parametrize(("workers", "elements"), [(1, 1000), (3, 334)])
def test_swap_buffers_hold_the_largest_partition(
    workers: int, elements: int, tmp_path: Path
) -> None:
    for name, shape in (("pruned", (10, 90)), ("base", (10, 100))):
        (tmp_path / name).mkdir()
        tensors = {"small": torch.zeros(3), "large": torch.zeros(shape)}
        save_file(tensors, tmp_path / name / "model.safetensors")
    models = [tmp_path / "pruned", tmp_path / "base"]
    nvme = {"zero_stage": 3, "offload_parameters": "nvme", "offload_dir": "/fast"}
    found = built(**nvme)
    size_swap_buffers(found, models, workers)
    assert found["zero_optimization"]["offload_param"]["buffer_size"] == elements
    users = {"zero_optimization": {"offload_param": {"buffer_size": 7}}}
    kept = built(users, **nvme)
    size_swap_buffers(kept, models, workers)
    assert kept["zero_optimization"]["offload_param"]["buffer_size"] == 7
    on_cpu = built(zero_stage=3, offload_parameters="cpu")
    size_swap_buffers(on_cpu, [], workers)
    assert on_cpu == built(zero_stage=3, offload_parameters="cpu")


def test_nothing_held_out_cannot_be_evaluated() -> None:
    with pytest.raises(ValueError, match="evaluate_every needs a source with held_out above 0"):
        built(evaluate_every=2)
